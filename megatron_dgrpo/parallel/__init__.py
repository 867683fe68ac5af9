"""Process groups, the CPU platform, collectives with gradients. It communicates; it owns no layout of tokens."""

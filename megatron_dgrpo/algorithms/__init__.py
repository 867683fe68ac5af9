"""Rewards to advantages to per-token streams, and the terms of the loss over them. Pure torch: no Megatron, no I/O."""

"""Decoders on Megatron-Core: what a model is, how it is built, its attention, norm and rotary embeddings."""

"""Hugging Face folders <-> Megatron-Core parameters, by one declarative table per family."""

"""Checkpoints: Hugging Face folders in `hf/`; Megatron's distributed format beside it."""

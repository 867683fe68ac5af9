"""A Megatron-Core training backend for dGRPO. Importing the package imports nothing else."""

__version__ = "0.1.0"

"""Configuration: frozen data, read from YAML with dotted overrides, checked whole before anything starts. No torch."""

from megatron_dgrpo.config.schema import Config

__all__ = ["Config"]

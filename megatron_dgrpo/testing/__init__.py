"""What tests stand on: ranks on gloo, tiny models, dense float64 references. Users' own tests may use it too."""

from megatron_dgrpo.testing.distributed import RankError, run_distributed, run_forked

__all__ = ["RankError", "run_distributed", "run_forked"]

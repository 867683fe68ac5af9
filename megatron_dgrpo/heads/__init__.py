"""Hidden states x vocabulary-parallel heads -> statistics of each row, with gradients. Heads know no algorithm."""

from megatron_dgrpo.heads.in_forward import row_statistics_with_gradients
from megatron_dgrpo.heads.results import RowStatistics
from megatron_dgrpo.heads.rows import gather_rows
from megatron_dgrpo.heads.shard import HeadShard
from megatron_dgrpo.heads.statistics import row_statistics

__all__ = ["HeadShard", "RowStatistics", "gather_rows", "row_statistics", "row_statistics_with_gradients"]

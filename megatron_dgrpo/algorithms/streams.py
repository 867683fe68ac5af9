"""Token streams: all that the trainer knows about an algorithm.

Legend: _N loss tokens of a whole batch, in the order in which they were sampled (trajectory by trajectory).

A stream index names one loss token. `weights` holds one stream per term, and the whole normalisation is in it: prompts,
group, length, data parallelism, context parallelism and micro-batches. The loss is a plain sum over all loss tokens of
all ranks of `weight x what the term says of the token`; nothing divides afterwards.

A whole batch's streams live on the CPU in float64; `to` brings a micro-batch's to the device and the type of its
statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Streams:
    targets_N: torch.Tensor  # int64
    sample_N: torch.Tensor  # int64, the trajectory's index in the batch
    position_N: torch.Tensor  # int64, the token's own position in its document (the prompt's first token has 0)
    weights: Mapping[str, torch.Tensor]  # term name -> [N]
    advantages_N: torch.Tensor | None = None
    behaviour_logprobs_N: torch.Tensor | None = None
    old_logprobs_N: torch.Tensor | None = None  # None: one update per batch, the old policy is the current one
    teacher_N: torch.Tensor | None = None  # int64, the number of the token's teacher; None: there is no choice
    num_samples: int | None = None  # trajectories in the whole batch, for terms that need sums over a sequence

    @property
    def num_tokens(self) -> int:
        return self.targets_N.numel()

    def select(self, index_R: torch.Tensor | slice) -> Streams:
        """The streams of some rows, in their order; a micro-batch's layout names them."""
        return self._map(lambda x: x[index_R])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Streams:
        """On the device; floating-point streams in `dtype` where one is given."""
        return self._map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def weighted(self, factor: float) -> Streams:
        """With all weights multiplied by a factor."""
        return replace(self, weights={name: factor * w for name, w in self.weights.items()})

    def _map(self, f) -> Streams:
        optional = lambda x: None if x is None else f(x)  # noqa: E731
        return replace(
            self,
            targets_N=f(self.targets_N),
            sample_N=f(self.sample_N),
            position_N=f(self.position_N),
            weights={name: f(w) for name, w in self.weights.items()},
            advantages_N=optional(self.advantages_N),
            behaviour_logprobs_N=optional(self.behaviour_logprobs_N),
            old_logprobs_N=optional(self.old_logprobs_N),
            teacher_N=optional(self.teacher_N),
        )

"""Micro-batches through the stages of a model, by Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_dgrpo.model.decoder import Decoder
from megatron_dgrpo.packing.layout import Layout

Finish = Callable[[torch.Tensor, Layout], tuple[torch.Tensor, Any]]
"""Final hidden states of a micro-batch to (loss, what to report). Called on the last stage only."""


def run_schedule(
    decoder: Decoder,
    models: Sequence[torch.nn.Module],
    layouts: Sequence[Layout],
    finish: Finish,
    *,
    forward_only: bool,
) -> list[Any]:
    """All micro-batches; what `finish` reported of each, on the last stage (elsewhere nothing).

    `models` are the decoder's parts, wrapped for training or as they are. Every stage of a pipeline is given the same
    micro-batches. Megatron scales nothing: 0 tokens are reported to it, which makes its divisor 1.
    """
    groups, config = decoder.groups, decoder.config
    virtual = len(models) if len(models) > 1 else None
    assert virtual is None or len(layouts) % groups.grid.pp == 0, "virtual stages take micro-batches in rounds of pp"

    def forward_step(batches: Iterator[Layout], model: Any) -> tuple[torch.Tensor, Any]:
        layout = next(batches)

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
            value, report = finish(hidden, layout)
            return value, torch.zeros((), dtype=torch.int32, device=hidden.device), report

        return model(layout), loss

    pipeline = {}
    if groups.grid.pp > 1:
        pipeline["p2p_communicator"] = P2PCommunicator(pp_group=groups.pp, config=config)
    schedule = get_forward_backward_func(pp_size=groups.grid.pp, vp_size=virtual)
    reports: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(layouts) for _ in models] if virtual else iter(layouts),
        model=list(models),
        num_microbatches=len(layouts),
        seq_length=max(layout.num_tokens for layout in layouts),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups.collection,
        **pipeline,
    )
    return reports

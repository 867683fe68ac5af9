"""Rules of `models.NAME` that hold for any model. What its own sizes rule out is found when its config.json is read."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dgrpo.config.schema import Config, Model


def problems(config: Config) -> Iterator[str]:
    """Layouts that contradict themselves, and settings that exclude each other."""
    for name, model in config.models.items():
        where, layout = f"models.{name}", model.layout
        if layout.sequence_parallel and layout.tp == 1:
            yield (
                f"{where}.layout.sequence_parallel: needs tensor parallelism; set {where}.layout.tp=2 or "
                f"more, or {where}.layout.sequence_parallel=false"
            )
        if layout.vpp > 1 and layout.pp == 1:
            yield (
                f"{where}.layout.vpp: {layout.vpp} parts of a pipeline stage, and there is no pipeline; set "
                f"{where}.layout.pp=2 or more, or {where}.layout.vpp=1"
            )
        if layout.tp * layout.cp * layout.dp % (layout.etp * layout.ep):
            yield (
                f"{where}.layout.ep: etp x ep = {layout.etp * layout.ep} does not divide tp x cp x dp = "
                f"{layout.tp * layout.cp * layout.dp}, the ranks of a stage; choose a divisor, or raise "
                f"{where}.layout.dp"
            )
        if model.fp8 is not None and model.dtype != "bfloat16":
            yield f"{where}.fp8: the weights beside FP8 products are bfloat16; set {where}.dtype=bfloat16"
        if model.fp8 is not None and model.layers == "local":
            yield f"{where}.fp8: needs Transformer Engine's layers; set {where}.layers=te, or {where}.fp8=null"
        if model.offload_layers:
            yield from _offload(where, model)


def _offload(where: str, model: Model) -> Iterator[str]:
    """What Megatron has no offload of activations beside."""
    off = f"or {where}.offload_layers=0"
    if model.layers == "local":
        yield f"{where}.offload_layers: needs Transformer Engine's layers; set {where}.layers=te, {off}"
    if model.layout.pp > 1:
        yield f"{where}.offload_layers: Megatron offloads no activations of a pipeline; set {where}.layout.pp=1, {off}"
    if model.recompute != "none":
        yield (
            f"{where}.offload_layers: what is computed again is not kept, on the device or elsewhere; set "
            f"{where}.recompute=none, {off}"
        )

"""Which layouts a model can have, how a pipeline cuts its layers, what a micro-batch is padded to. Imports no torch."""

from __future__ import annotations

from megatron_dgrpo.config.schema import Layout
from megatron_dgrpo.config.stages import FP8, padding_unit
from megatron_dgrpo.model.spec import ModelSpec

__all__ = ["FP8", "layout_problems", "padding_unit", "pipeline_split"]


def layout_problems(spec: ModelSpec, layout: Layout) -> list[str]:
    """Every reason for which this model can't have this layout, each with its remedy."""
    problems = []
    tp, experts = layout.tp, spec.num_experts
    if layout.sequence_parallel and tp == 1:
        problems.append("sequence_parallel needs tensor parallelism: set tp=2 or more, or sequence_parallel=false")
    if layout.vpp > 1 and layout.pp == 1:
        problems.append(f"vpp={layout.vpp} cuts a pipeline's stages, and pp=1 has none: set pp=2 or more, or vpp=1")
    if spec.num_heads % tp:
        problems.append(f"tp={tp} does not divide the {spec.num_heads} attention heads: choose a divisor of them")
    if max(spec.num_kv_heads, tp) % min(spec.num_kv_heads, tp):
        problems.append(f"tp={tp} neither divides the {spec.num_kv_heads} key-value heads nor is a multiple of them")
    width, axis = ("an expert's", "etp") if experts else ("the MLP's", "tp")
    if spec.ffn_size % getattr(layout, axis):
        problems.append(
            f"{axis}={getattr(layout, axis)} does not divide {width} width {spec.ffn_size}: choose a divisor of it"
        )
    if layout.pp * layout.vpp > spec.num_layers:
        problems.append(
            f"pp={layout.pp} x vpp={layout.vpp} is more than the {spec.num_layers} layers: each part needs one at least"
        )
    if not experts:
        problems += [
            f"{axis}={getattr(layout, axis)}: the model has no experts to spread; set {axis}=1"
            for axis in ("ep", "etp")
            if getattr(layout, axis) > 1
        ]
    elif experts % layout.ep:
        problems.append(f"ep={layout.ep} does not divide the {experts} experts: choose a divisor of them")
    if experts and tp > 1 and not layout.sequence_parallel:
        problems.append(f"experts with tp={tp} need the tokens cut between the ranks: set sequence_parallel=true")
    return problems


def pipeline_split(num_layers: int, num_chunks: int) -> list[int]:
    """Layers of each part of a pipeline. The embedding and the head weigh as much as one layer each.

    Every part has a layer at least, and the heaviest is as light as can be. With virtual stages part i is chunk
    i // pp of stage i % pp.
    """
    assert num_layers >= num_chunks
    weight = [1] * num_chunks
    weight[0] += 1
    weight[-1] += 1
    layers = [1] * num_chunks
    for _ in range(num_layers - num_chunks):
        lightest = min(range(num_chunks), key=lambda i: weight[i])
        weight[lightest] += 1
        layers[lightest] += 1
    return layers

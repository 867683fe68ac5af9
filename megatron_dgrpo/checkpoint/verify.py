"""Is a Megatron checkpoint the model of a Hugging Face folder?

Two questions, since either alone can be answered wrongly. Are all weights the same bits (in the checkpoint's type)?
That sees every row of the embedding, and nothing of a mapping that is wrong in both directions. Does the model compute
what transformers does, in float32, on random tokens? That sees the mapping, and not the rows of ids that were not
drawn. Hidden states are compared after every layer, so that the first that differs can be named.

The reference is loaded in the type of its files, and each module's weights are widened only while it runs: it needs
the model once in that type, on the first rank, before the Megatron model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_dgrpo.checkpoint.agree import agreed
from megatron_dgrpo.checkpoint.convert import build, check_tokenizer, held_bytes, layout
from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.headers import check_tensors
from megatron_dgrpo.checkpoint.hf.importer import local_parts
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.checkpoint.hf.safetensors_folder import SafetensorsFolder
from megatron_dgrpo.checkpoint.megatron import load_megatron, read_about
from megatron_dgrpo.checkpoint.progress import ByteProgress
from megatron_dgrpo.errors import ConversionError, listing
from megatron_dgrpo.model.decoder import Decoder
from megatron_dgrpo.packing.pack import Packing
from megatron_dgrpo.packing.trees import sequence

NUM_TOKENS = 64
TOLERANCE = 1e-4
_MOST_LISTED = 20

Outputs = dict[str, torch.Tensor]


def verify(hf: Path, megatron: Path) -> str:
    """Every rank of the world calls it. Returns what was compared; every difference is in one error."""
    about, spec = read_about(megatron), read_spec(hf)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, min(NUM_TOKENS, spec.max_positions))
    with agreed(dist.group.WORLD):
        notes = check_tokenizer(hf, spec)
        expected = reference_outputs(hf, tokens) if dist.get_rank() == 0 else {}
    decoder = build(about.spec, layout(about.spec), torch.float32)
    load_megatron(decoder, megatron)
    problems = _differing_weights(decoder, hf, about.dtype)
    found = decoder_outputs(decoder, tokens)
    words = ""
    with agreed(dist.group.WORLD):
        if dist.get_rank() == 0:
            error, layer = first_difference(expected, found)
            if layer is not None:
                problems.insert(0, f"{layer} is the first whose output differs, by {error:.1e} of its size")
            words = (
                f"largest difference of hidden states and logits {error:.1e} of their size ({TOLERANCE:.0e} allowed)"
            )
        if problems:
            raise ConversionError(listing(f"{megatron} is not the model of {hf}:", problems))
    compared = f"all weights have the same bits in {str(about.dtype).removeprefix('torch.')}"
    return "\n".join([*notes, f"{compared}; on {len(tokens)} random tokens: {words}"])


def reference_outputs(hf: Path, tokens: np.ndarray) -> Outputs:
    """Hidden states after every decoder layer, and the logits, in float32 from transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype="auto", local_files_only=True, trust_remote_code=False)
    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow)
    outputs: Outputs = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(_keep(outputs, f"layer {number}", lambda hidden: hidden[0]))
    with torch.no_grad():
        outputs["logits"] = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    return outputs


def _widen(module: torch.nn.Module, inputs: Any) -> None:
    module._narrow = {name: p.data for name, p in module._parameters.items() if p is not None}  # type: ignore[assignment]
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.float()


def _narrow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    for name, data in module._narrow.items():  # type: ignore[union-attr, operator]
        module._parameters[name].data = data  # type: ignore[union-attr]


def _keep(outputs: Outputs, name: str, choose: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs[name] = choose(hidden.detach()).clone()

    return hook


@torch.no_grad()
def decoder_outputs(decoder: Decoder, tokens: np.ndarray) -> Outputs:
    """The same of a decoder; the logits are gathered on every rank."""
    outputs: Outputs = {}
    part: Any = decoder.parts[0]  # there is no pipeline
    hooks = [
        layer.register_forward_hook(_keep(outputs, f"layer {layer.layer_number - 1}", lambda hidden: hidden[:, 0]))
        for layer in part.decoder.layers
    ]
    whole = sequence("0", tokens, np.arange(len(tokens)) > 0, 0)
    (packed,) = Packing(max_tokens=len(tokens)).micro_batches([whole])
    hidden, head = part(packed)[:, 0], decoder.head()
    logits = hidden @ head.weight_VH[: head.num_valid].T
    for hook in hooks:
        hook.remove()
    parts: list[Any] = [None] * decoder.groups.tp.size()
    dist.all_gather_object(parts, logits.cpu(), group=decoder.groups.tp)
    outputs["logits"] = torch.cat(parts, 1)
    return outputs


def first_difference(expected: Outputs, found: Outputs) -> tuple[float, str | None]:
    """The largest difference, and where it was first too large: relative to the norm of the expected values."""
    largest = 0.0
    for name, values in expected.items():
        other = found[name].float().cpu()
        if other.shape != values.shape:
            return float("inf"), f"{name} (of shape {list(other.shape)} instead of {list(values.shape)})"
        error = ((other - values).norm() / values.norm()).item()
        largest = max(largest, error)
        if not error <= TOLERANCE:  # also not a number
            return error, name
    return largest, None


def _differing_weights(decoder: Decoder, hf: Path, dtype: torch.dtype) -> list[str]:
    """The tensors that are not those of the folder, in the checkpoint's type, on any rank."""
    differing: dict[str, None] = {}
    with agreed(dist.group.WORLD):
        headers = check_tensors(hf, rules(decoder.spec), decoder.spec)
    with (
        SafetensorsFolder(headers) as files,
        ByteProgress("comparing weights", held_bytes(decoder), shown=dist.get_rank() == 0) as progress,
    ):
        for rule, box, held in local_parts(decoder):
            for rows, part in _row_blocks(box, held):
                if not torch.equal(files.read(rule.hf_name, rows).to(dtype), part.to(dtype).cpu()):
                    differing[rule.hf_name] = None
            progress(held.nbytes)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(differing))
    found = [f"{name} has other values" for name in dict.fromkeys(name for names in everyone for name in names)]
    return found[:_MOST_LISTED] + [f"and {len(found) - _MOST_LISTED} more"] * (len(found) > _MOST_LISTED)


def _row_blocks(box: Sequence[tuple[int, int]], held: torch.Tensor) -> Any:
    """A part in blocks of rows that are small beside the model."""
    step = max(1, (16 << 20) // max(1, held[:1].nbytes))
    for first in range(0, len(held), step):
        last = min(first + step, len(held))
        yield ((box[0][0] + first, box[0][0] + last), *box[1:]), held[first:last]

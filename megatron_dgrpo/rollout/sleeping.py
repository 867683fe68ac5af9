"""An engine that gives its GPU's memory back while the student trains there: vLLM's sleep at level 2, and waking.

    sleep            weights, keys and values lose their memory; addresses stay, CUDA graphs with them
    wake weights     the weights' memory is back, and holds nothing; what no update brings is put back
    (an update)      every parameter to its last element: `loading` refuses an update that would leave one out
    wake kv_cache    the cache's memory is back; only then may anything be generated

What no update brings: vLLM saves buffers itself (the tables of rotary embeddings among them, persistent or not).
Tensors that are plain attributes of a module, or of what computes for it, were allocated in the same pool and are lost
with it: they are saved and put back here. Derived from weights they would be old, but the models of this project have
none that are: vLLM's own update would leave such a tensor old, too.

The pool is vLLM's `CuMemAllocator`. It cannot use expandable segments and turns them off where it allocates, without
changing the process's other settings; the trainer's own process may have them, unless its memory is mapped (`ipc`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_dgrpo.errors import RolloutError

_SAVED = "_dgrpo_loose_tensors"


def sleep(llm: Any) -> None:
    _everywhere(llm, save_loose)
    llm.sleep(level=2)


def wake(llm: Any, what: str) -> None:
    llm.wake_up(tags=[what])
    if what == "weights":
        _everywhere(llm, restore_loose)


def gpus(llm: Any) -> tuple[str, ...]:
    """The UUID of every rank's GPU; none where there are no GPUs."""
    from vllm.platforms import current_platform

    return tuple(llm.collective_rpc(_uuid)) if current_platform.is_cuda() else ()


def _uuid(worker: Any) -> str:
    return str(torch.cuda.get_device_properties(worker.device).uuid)


def _everywhere(llm: Any, function: Any) -> None:
    said = [text for text in llm.collective_rpc(_attempt, args=(function,)) if text]
    if said:
        raise RolloutError("\n".join(dict.fromkeys(said)))


def _attempt(worker: Any, function: Any) -> str:
    try:
        function(worker)
    except Exception as error:  # of several workers' errors vLLM would leave all but one in its queues
        return f"{type(error).__name__}: {error}"
    return ""


def save_loose(worker: Any) -> None:
    setattr(worker, _SAVED, [(t, t.cpu().clone()) for t in loose_tensors(worker.model_runner.get_model())])


@torch.no_grad()
def restore_loose(worker: Any) -> None:
    for tensor, saved in getattr(worker, _SAVED, []):
        tensor.copy_(saved)
    setattr(worker, _SAVED, [])


def loose_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors that a model's modules and their quant methods hold as attributes, neither parameters nor buffers."""
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "quant_method", None), getattr(module, "impl", None)):
            for tensor in _held(vars(holder) if hasattr(holder, "__dict__") else {}):
                if id(tensor) not in known and tensor.numel():
                    found.setdefault(id(tensor), tensor)
    return list(found.values())


def _held(values: dict[str, Any]) -> Iterator[torch.Tensor]:
    for name, value in values.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else (value,)
        yield from (item for item in items if isinstance(item, torch.Tensor))

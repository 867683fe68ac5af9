"""Megatron-Core on machines without CUDA.

Megatron-Core calls CUDA by name: it asks for the current device and streams, saves and restores the CUDA random
state, creates buffers with `device="cuda"`, moves tensors with `.cuda()` and compares `tensor.type()` with strings
such as "torch.cuda.FloatTensor". On a machine with CUDA nothing here does anything. On one without, each of these
must mean the CPU, *inside Megatron only*: mapping `torch.cuda` for the whole process corrupts other libraries without
a word (transformers then leaves rotary frequencies uninitialised), and vLLM would take the machine for one with a
GPU.

So the mapping is confined to the modules named `megatron.*`:

- Each such module's global name `torch` is replaced, right after the module has run, with a *view*: an object that
  answers like torch, except for a `cuda` namespace whose functions mean the CPU, and tensor factories that read
  `device="cuda"` as the CPU. `torch` itself, and so `torch.cuda.is_available()`, stays what it was for everyone else.
- `Tensor.cuda`, `Tensor.type` and `Tensor.float` are methods of a class that all libraries share. They are wrapped
  once, and answer differently only when the calling code is in a `megatron.*` module.
- The three functions of Megatron that read or write the CUDA random state, or test `is_cuda` before a copy to the
  host, are replaced in their modules.
- gloo refuses to gather or reduce-scatter uneven parts; Megatron's two functions that do so (expert dispatch) get a
  form made of operations that gloo has.

float64 is part of the platform, since gradient parity is shown in it: Megatron's optimizer accepts float32 "types"
only and calls `.float()` on gradients; inside Megatron a float64 tensor reports the float32 type and `.float()` keeps
it.

`install()` must run before anything of Megatron is imported for its decorators to see the view; modules that were
imported earlier are patched as well, as far as a name can be.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "linspace",
    "eye",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)


class _Event:
    """Everything on the CPU has happened by the time it is asked about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    """The CPU has one stream, and it is always in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return _Event()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _cuda_names() -> dict[str, Any]:
    return {
        "current_device": lambda: _CPU,
        "device": lambda *a, **k: contextlib.nullcontext(),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "set_device": _nothing,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "default_stream": lambda *a, **k: _Stream(),
        "current_stream": lambda *a, **k: _Stream(),
        "is_current_stream_capturing": lambda: False,
    }


class _View(types.ModuleType):
    """A module seen through a few replaced names."""

    def __init__(self, real: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if self._real is torch:
            self.__dict__[name] = value  # one dictionary look-up from then on: this is on every operation's path
        return value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _torch_view() -> _View:
    names = _cuda_names()
    cuda = _View(torch.cuda, names)
    cuda.__dict__["random"] = _View(torch.cuda.random, {"get_rng_state": names["get_rng_state"]})
    view = _View(torch, {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    view.__dict__["cuda"] = cuda
    return view


def _patch_module(module: types.ModuleType, view: _View) -> None:
    if module.__dict__.get("torch") is torch:
        module.torch = view  # type: ignore[attr-defined]
    name, names = module.__name__, module.__dict__
    if name == "megatron.core.tensor_parallel.random":
        names["_set_cuda_rng_state"] = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
        names["_get_cuda_rng_state"] = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    elif name in ("megatron.core.transformer.moe.moe_utils", "megatron.core.transformer.moe.token_dispatcher"):
        names["maybe_move_tensor_to_cpu"] = _to_host
    elif name == "megatron.core.tensor_parallel.mappings":
        _patch_uneven_collectives(names)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_uneven_collectives(names: dict[str, Any]) -> None:
    even_gather, even_scatter = names["_gather_along_first_dim"], names["_reduce_scatter_along_first_dim"]

    def gather(x: torch.Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *rest: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, None, *rest)
        parts = [x.new_empty((int(n), *x.shape[1:])) for n in output_split_sizes]
        parts[group.rank()].copy_(x)
        for source, part in enumerate(parts):
            torch.distributed.broadcast(part, group_src=source, group=group)
        return torch.cat(parts)

    def scatter(x: torch.Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *rest: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, None, *rest)
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x, group=group)
        return x.split([int(n) for n in input_split_sizes])[group.rank()].clone()

    names["_gather_along_first_dim"], names["_reduce_scatter_along_first_dim"] = gather, scatter


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _patch_tensor_methods() -> None:
    real_cuda, real_type, real_float = torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.float

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else real_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if not args and not kwargs and _called_from_megatron():
            answer = answer.replace("torch.", "torch.cuda.", 1).replace("DoubleTensor", "FloatTensor")
        return answer

    def float_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and _called_from_megatron():
            return self
        return real_float(self, *args, **kwargs)

    torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.float = cuda, type_, float_  # type: ignore[assignment]


class _Finder(importlib.machinery.PathFinder):
    """Finds megatron.* where the ordinary finder does, and patches each module once it has run."""

    view: _View

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith("megatron."):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_patch(module: types.ModuleType) -> None:
                execute(module)
                _patch_module(module, cls.view)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Make `megatron.*` run on the CPU where no CUDA exists; do nothing where it does, or when done before."""
    if torch.cuda.is_available() or _Finder in sys.meta_path:
        return
    warnings.filterwarnings("ignore", module=r"megatron\..*")  # each is about an extension that only CUDA has
    _Finder.view = _torch_view()
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    _patch_tensor_methods()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            _patch_module(module, _Finder.view)


def device() -> torch.device:
    """Where a rank's model lives."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"

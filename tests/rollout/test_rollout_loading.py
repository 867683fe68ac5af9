"""Places found by watching a loader: what is copied through them is what the loader itself copies."""

from __future__ import annotations

import pytest
import torch

from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.loading import copy_rows, find_places


class Model(torch.nn.Module):
    """Loads as vLLM does on rank 1 of 2: rows of one tensor, columns of another, two in one parameter, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = torch.nn.Parameter(torch.full((5, 6), float("nan")), requires_grad=False)
        self.columns = torch.nn.Parameter(torch.full((4, 3), float("nan")), requires_grad=False)
        self.padded = torch.nn.Parameter(torch.full((6, 2), float("nan"), dtype=torch.bfloat16), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
        self.computes = False

    def load_weights(self, weights):
        for name, tensor in weights:
            if self.computes:
                tensor = tensor * 2
            if name == "q":
                self.fused.data.narrow(0, 0, 3).copy_(tensor.narrow(0, 3, 3))
            elif name == "k":
                self.fused.data.narrow(0, 3, 2).copy_(tensor.narrow(0, 2, 2).to("cpu"))
            elif name == "o":
                self.columns.data.copy_(tensor.narrow(1, 3, 3))
            elif name == "e":
                self.padded[:4].data.copy_(tensor[4:8])
                self.padded[4:].data.fill_(0)
            elif name == "s":
                self.scale.data.copy_(tensor)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (6, 6), "k": (4, 6), "o": (4, 6), "e": (8, 2), "s": (), "unused": (3,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def manifest(leave_out: str = ""):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors().items() if name != leave_out}


@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_rows_in_pieces_fill_what_the_loader_fills(step):
    watched, loaded = Model(), Model()
    loaded.load_weights(tensors().items())
    places = find_places(watched, manifest())
    assert watched.fused.isnan().all() and watched.columns.isnan().all()  # nothing was copied yet
    copied = 0
    for name, tensor in tensors().items():
        for start in range(0, len(tensor) if tensor.dim() else 1, step):
            copied += copy_rows(places[name], start, tensor[start : start + step] if tensor.dim() else tensor)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, watched.get_parameter(name)), name
    assert copied == 3 * 6 + 2 * 6 + 4 * 3 + 4 * 2 + 1  # each element that is needed, once


@pytest.mark.parametrize(
    ("leave_out", "words"),
    [("q", "fused: 18 of its 30 elements"), ("k", "fused: 12 of its 30"), ("e", "padded: 12 of"), ("s", "scale: 1 of")],
)
def test_parameters_that_would_stay_old_are_named(leave_out, words):
    with pytest.raises(TransferError, match=words):
        find_places(Model(), manifest(leave_out))


def test_a_loader_that_computes_cannot_be_followed():
    model = Model()
    model.computes = True
    with pytest.raises(TransferError, match=r"computes something from .* before it loads it, as a \[3, 6\]"):
        find_places(model, manifest())

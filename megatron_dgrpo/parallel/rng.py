"""This rank's random states, as text for a checkpoint: torch's, the device's, and those of Megatron's tracker."""

from __future__ import annotations

import base64

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_CPU, _DEVICE, _TRACKED = "cpu", "device", "tracked/"


def random_states() -> dict[str, torch.Tensor]:
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_DEVICE] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    return states | {f"{_TRACKED}{name}": state for name, state in tracked.items() if torch.is_tensor(state)}


def to_text(states: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: base64.b64encode(state.cpu().numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_states(texts: dict[str, str]) -> None:
    states = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in texts.items()
    }
    torch.set_rng_state(states[_CPU])
    if _DEVICE in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[_DEVICE])
    tracker = get_cuda_rng_tracker()
    found = {name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)}
    tracker.set_states(tracker.get_states() | found)

"""What a library says of itself when it is imported, asked in a process of its own.

`python -m megatron_dgrpo.launch.probes torch` prints one line of JSON. The doctor asks this way because an import can
end the process (a wheel for another processor by SIGILL, a broken driver by SIGSEGV), hang, or print what it likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

DEADLINE_S = 180.0  # a cold network file system takes minutes to import torch


def probe(name: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """The library's answer, or `{"error": why there is none}`."""
    command = [sys.executable, "-m", "megatron_dgrpo.launch.probes", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": f"importing it took more than {deadline_s:g} s"}
    last_words = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
    if done.returncode < 0:
        return {"error": f"importing it ended the process by signal {-done.returncode} ({last_words[0].strip()})"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"importing it ended the process with status {done.returncode} ({last_words[0].strip()})"}
    assert isinstance(answer, dict)
    return answer


def ask_torch() -> dict[str, Any]:
    import torch

    answer: dict[str, Any] = {
        "cuda_built": torch.version.cuda,
        "gloo": torch.distributed.is_gloo_available(),
        "devices": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"{device.major}.{device.minor}"
            answer["devices"].append({"name": device.name, "capability": capability, "bytes": device.total_memory})
    elif torch.version.cuda:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            answer["why_no_cuda"] = str(error).splitlines()[0]
    return answer


def ask_megatron() -> dict[str, Any]:
    import megatron.core
    import megatron.core.tensor_parallel  # the package itself imports next to nothing

    return {"version": megatron.core.__version__}


def ask_transformer_engine() -> dict[str, Any]:
    import transformer_engine.pytorch as te

    recipes = {
        "per-tensor": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "MXFP8": te.is_mxfp8_available,
    }
    return {"fp8": {name: list(available(return_reason=True)) for name, available in recipes.items()}}


PROBES = {"torch": ask_torch, "megatron": ask_megatron, "transformer_engine": ask_transformer_engine}


def main(name: str) -> None:
    real_stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere, also from C
    try:
        answer = PROBES[name]()
    except Exception as error:  # whatever an import raises is the answer
        answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")}
    os.write(real_stdout, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1])

"""The part of a dry run that needs torch, in a process of its own: shapes of all ranks, data, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.config.loader import load
from megatron_dgrpo.errors import DGRPOError
from megatron_dgrpo.train.checks import check_data
from megatron_dgrpo.train.shapes import stage_holdings


def main(*, config_path: str, answer_path: str, alone: Sequence[str]) -> None:
    """Target of the supervisor. `alone` are models of which there is a config.json and nothing else."""
    config = load(config_path)
    answer: dict[str, Any] = {"problems": [], "notes": [], "held": {}, "device_memory": None}
    for name in dict.fromkeys([config.student, *(teacher.model for teacher in config.teachers)]):
        model = config.models[name]
        try:
            held = stage_holdings(read_spec(model.path, model.rope), model)
            answer["held"][name] = [asdict(one) for one in held]
        except DGRPOError as error:
            answer["problems"].append(f"models.{name}: {error}")
    try:
        answer["notes"] = check_data(config, without_tokenizer=alone, dry=True)
    except DGRPOError as error:
        answer["problems"].append(str(error))
    if torch.cuda.is_available():
        answer["device_memory"] = torch.cuda.get_device_properties(0).total_memory
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")

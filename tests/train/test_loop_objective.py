"""What a whole run optimises, against the formula worked out by hand from its journal.

A real run generates with its engine, scores, and makes two updates of one batch at TP2. From the journal (tokens,
rewards, which samples each update used) and the two model folders alone, dense float64 models and torch's AdamW make
the same two updates: the logged losses, divergences and norms, and the exported weights, are those of the formula. In
the second update the ratios differ from 1, and the clipping acts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.launch.run import train
from megatron_dgrpo.observe.metrics import read_metrics
from megatron_dgrpo.packing.trajectory import Trajectory
from megatron_dgrpo.rollout.journal import read_step
from megatron_dgrpo.testing.reference import Reference, Response, dgrpo
from megatron_dgrpo.testing.transformers_reference import as_reference

TEMPERATURE, BETA, CLIP, WITHIN = 0.7, 0.5, 0.1, 1e-5
ADAM = {"lr": 2e-2, "betas": [0.9, 0.95], "eps": 1e-2, "weight_decay": 0.1}
CLIP_GRAD = 0.05


def _config(files: Path, run_dir: Path) -> dict[str, Any]:
    layout = {"tp": 2, "sequence_parallel": True}
    return {
        "run_dir": str(run_dir),
        "models": {
            name: {"path": str(files / name), "dtype": "float32", "layout": layout} for name in ("student", "teacher")
        },
        "student": "student",
        "teachers": [{"model": "teacher"}],
        "engines": {"rollout": {"model": "student", "max_model_len": 32, "kv_cache_bytes": 2**26}},
        "stages": [
            {
                "kind": "dgrpo",
                "data": {"path": str(files / "task/train.jsonl")},
                "engine": "rollout",
                "steps": 1,
                "prompts_per_step": 6,
                "group_size": 4,
                "updates_per_batch": 2,
                "sampling": {"max_tokens": 4, "temperature": TEMPERATURE},
                "rewards": [
                    {"kind": "regex", "pattern": "v[0-3]$"},
                    {"kind": "regex", "name": "key", "pattern": "k[0-9] ", "weight": -0.25},
                ],
                "objective": {"beta": BETA, "clip_low": CLIP, "clip_high": CLIP},
                "optimizer": ADAM | {"clip_grad": CLIP_GRAD},
            }
        ],
    }


def _responses(members: list[Trajectory]) -> list[Response]:
    return [
        Response(
            t.prompt_tokens.tolist(),
            t.response_tokens.tolist(),
            t.rewards["regex"] - 0.25 * t.rewards["key"],
            t.prompt_id,
        )
        for t in members
    ]


def _by_hand(files: Path, batches: list[list[Response]]) -> tuple[list[tuple[Reference, float]], Any]:
    """(objective, norm of its gradient) of each update, and the model after the last."""
    student, teacher = (as_reference(files / name, torch.float64) for name in ("student", "teacher"))
    logits = [lambda ids, model=model: model(ids[None]).logits[0] for model in (student, teacher)]
    settings: dict[str, Any] = {"beta": BETA, "clip_low": CLIP, "clip_high": CLIP, "temperature": TEMPERATURE}
    with torch.no_grad():  # the weights that the batch began with
        old = [dgrpo(batch, *logits, **settings).logprobs for batch in batches]
    parameters = list(student.parameters())
    norms, matrices = ([p for p in parameters if (p.dim() > 1) is wanted] for wanted in (False, True))
    adam = torch.optim.AdamW([{"params": norms, "weight_decay": 0.0}, {"params": matrices}], **ADAM)
    found = []
    for batch, old_logprobs in zip(batches, old, strict=True):
        behind = [Response(r.prompt, r.tokens, r.reward, r.group, o) for r, o in zip(batch, old_logprobs, strict=True)]
        objective = dgrpo(behind, *logits, **settings)
        adam.zero_grad()
        objective.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_GRAD).item()
        adam.step()
        found.append((objective, norm))
    return found, student


def test_the_loop_optimises_the_formula(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_config(files, tmp_path / "run")))
    assert train(load(path)) == 0
    step = read_step(tmp_path / "run/rollouts", 0, 1)
    of_sample = {(t.prompt_id, t.sample): t for t in step.trajectories}
    used = [update.samples for update in step.trained]
    assert len(of_sample) == 24 and sorted(s for samples in used for s in samples) == sorted(of_sample)
    objectives, expected = _by_hand(files, [_responses([of_sample[s] for s in samples]) for samples in used])
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl").records if "update" in r]
    assert len(records) == 2 and all(any(o.advantages) for o, _ in objectives)
    for record, (objective, norm) in zip(records, objectives, strict=True):
        assert norm > CLIP_GRAD
        assert record["loss"] == pytest.approx(objective.loss.item(), rel=WITHIN)
        assert record["surrogate/loss"] == pytest.approx(objective.surrogate.item(), rel=WITHIN, abs=1e-7)
        assert record["teacher_kl/loss"] == pytest.approx(objective.kl.item(), rel=WITHIN)
        assert record["grad_norm"] == pytest.approx(norm, rel=WITHIN)
    second = objectives[1][0]
    assert second.clipped_high > 0 and second.clipped_low > 0 and abs(second.surrogate.item()) > 1e-3
    assert records[1]["surrogate/clipped_high"] == pytest.approx(second.clipped_high)
    assert records[1]["surrogate/clipped_low"] == pytest.approx(second.clipped_low)
    exported, before = (as_reference(folder, torch.float64) for folder in (tmp_path / "run/hf", files / "student"))
    start = dict(before.named_parameters())
    for (name, found), wanted in zip(exported.named_parameters(), expected.parameters(), strict=True):
        moved = (wanted - start[name]).abs().max().item()
        assert moved > 1e-4 and (found - start[name]).abs().max() > 1e-4, name
        # beside the move's own error a few roundings of the weight to float32
        torch.testing.assert_close(found, wanted, rtol=2**-21, atol=WITHIN * moved, msg=lambda m, n=name: f"{n}: {m}")

"""`dgrpo generate` and `dgrpo eval` with a real engine on a tiny model; their figures by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.cli import main
from megatron_dgrpo.config.rewards import ExactMatch
from megatron_dgrpo.errors import ConfigError, DataError
from megatron_dgrpo.launch.trial import trial_config
from megatron_dgrpo.testing.distributed import run_forked
from megatron_dgrpo.train.trial import figures


def _make(folder: str) -> None:
    from megatron_dgrpo.testing.one_hop_models import write_models

    write_models(Path(folder), 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_hop")
    run_forked(_make, str(folder))
    return folder


SMALL = [
    "models.student.dtype=float32", "engines.rollout.max_model_len=32", "engines.rollout.kv_cache_bytes=67108864",
    "evaluation.sampling.max_tokens=4",
]  # fmt: skip


def test_generate(files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out/responses.jsonl"
    data = ["--data", str(files / "task/heldout.jsonl"), "--prompts", "5", "--samples", "2"]
    status = main(["generate", str(files / "student"), *data, "--out", str(out), "--token-ids", "--logprobs", *SMALL])
    assert status == 0, capfd.readouterr().err
    assert f"10 responses to 5 prompts: {out}" in capfd.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [json.loads(line) for line in (files / "task/heldout.jsonl").read_text().splitlines()][:5]
    assert sorted({(line["prompt"], line["answer"]) for line in lines}) == sorted(
        (r["prompt"], r["answer"]) for r in rows
    )
    for line in lines:
        assert 1 <= len(line["response_ids"]) <= 4 and len(line["logprobs"]) == len(line["response_ids"])
        assert max(line["logprobs"]) < 0 and line["finish_reason"] in ("stop", "length")
        assert line["response"].split() == line["response"].strip().split(" ") or not line["response"]
    assert len({(line["id"], tuple(line["response_ids"])) for line in lines}) > 5, "samples have seeds of their own"


def test_eval(files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The figures are those of the responses that it wrote."""
    summary, responses = tmp_path / "figures.json", tmp_path / "responses.jsonl"
    arguments = ["--data", str(files / "task/heldout.jsonl"), "--prompts", "40", "--samples", "4"]
    arguments += ["--json", str(summary), "--responses", str(responses), *SMALL]
    arguments += ["evaluation.rewards=[{kind: exact_match}, {kind: contains, weight: 0.5}]"]
    assert main(["eval", str(files / "student"), *arguments]) == 0, capfd.readouterr().err
    found = json.loads(summary.read_text())
    lines = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(lines) == 160 and (found["prompts"], found["samples"], found["left_out"]) == (40, 4, 0)
    exact: dict[str, list[float]] = {}
    for line in lines:
        exact.setdefault(line["id"], []).append(float(line["response"].strip() == line["answer"]))
        assert line["rewards"]["exact_match"] == exact[line["id"]][-1]
        assert line["total"] == line["rewards"]["exact_match"] + 0.5 * line["rewards"]["contains"]
    means = [np.mean(values) for values in exact.values()]
    assert found["rewards"]["exact_match"]["mean"] == pytest.approx(np.mean(means))
    assert found["rewards"]["exact_match"]["error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(40))
    assert found["rewards"]["exact_match"]["best"] == pytest.approx(np.mean([max(v) for v in exact.values()]))
    assert found["total"]["mean"] == pytest.approx(np.mean([line["total"] for line in lines]))
    said = capfd.readouterr().out
    assert "avg@4" in said and "40 prompts, 4 responses each" in said


def test_figures() -> None:
    reward = ExactMatch(kind="exact_match", weight=2.0)
    scores = [[{"exact_match": 1.0}, {"exact_match": 0.0}], [{"exact_match": 1.0}, {"exact_match": 1.0}]]
    found = figures([reward], scores)
    assert found["rewards"]["exact_match"] == {"weight": 2.0, "mean": 0.75, "error": 0.25, "best": 1.0}
    assert found["total"] == {"mean": 1.5, "error": 0.5, "best": 2.0}
    with pytest.raises(DataError):
        figures([reward], [])


def test_the_config_of_a_run_and_what_is_refused(files: Path, tmp_path: Path) -> None:
    text = f"""
run_dir: r
models: {{small: {{path: {files / "student"}, dtype: float32, layout: {{tp: 2}}}}, big: {{path: x}}}}
student: small
teachers: [{{model: big}}]
engines:
  a: {{model: small, max_model_len: 32, addresses: ["tcp:h:1"], key_file: k}}
  b: {{model: small, max_model_len: 8}}
evaluation:
  data: {{path: held.jsonl, prompt: q}}
  engine: a
  num_prompts: 7
  sampling: {{max_tokens: 4}}
  rewards: [{{kind: number}}]
stages: [{{kind: sft, data: {{path: d}}, steps: 3, batch_size: 1, optimizer: {{lr: 1.0}}}}]
"""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="exported no model"):
        trial_config(tmp_path, [], data=None, rewards=None)
    (tmp_path / "hf").mkdir()
    config = trial_config(tmp_path, ["evaluation.sampling.temperature=0.5"], data=None, rewards=None)
    assert config.models["small"].path == str(tmp_path / "hf") and list(config.models) == ["small"]
    assert config.models["small"].layout.tp == 1 and config.teachers == ()
    assert list(config.engines) == ["a"] and config.engines["a"].addresses == ()
    assert config.evaluation is not None and config.evaluation.data.prompt == "q"
    assert config.evaluation.sampling.temperature == 0.5 and config.evaluation.rewards[0].kind == "number"
    with pytest.raises(ConfigError, match="data: missing"):
        trial_config(files / "student", [], data=None, rewards=[{"kind": "json_valid"}])
    with pytest.raises(ConfigError, match="rewards: missing"):
        trial_config(files / "student", [], data="x.jsonl", rewards=None)

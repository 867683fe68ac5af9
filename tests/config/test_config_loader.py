"""YAML and overrides to a config and back, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dgrpo.config.loader import dump, load
from megatron_dgrpo.config.objective import Constant
from megatron_dgrpo.config.schema import DGRPO, SFT
from megatron_dgrpo.errors import ConfigError

GOOD = """
run_dir: runs/first
student: small
models:
  small: {path: models/small, dtype: float32, layout: {tp: 2}}
  qwen3-0.6b: {path: models/qwen, dtype: bfloat16, layout: {tp: 2}}
teachers: [{model: qwen3-0.6b}]
engines:
  main: {model: small, max_model_len: 512}
stages:
  - kind: sft
    data: {path: data/train.jsonl}
    steps: 10
    optimizer: {lr: 1e-3}
    batch_size: 8
  - kind: dgrpo
    data: {path: data/train.jsonl}
    steps: 10
    optimizer: {lr: 1e-3, betas: [0.9, 0.99]}
    engine: main
    prompts_per_step: 8
    group_size: 4
    sampling: {max_tokens: 8}
    rewards: [{kind: exact_match}]
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The problems that loading lists, one a line."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    title, *lines = str(caught.value).splitlines()
    assert str(path) in title
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


def only(path: Path, *overrides: str) -> str:
    (problem,) = problems(path, *overrides)
    return problem


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    return path


# ---- What is right ---------------------------------------------------------------------------------------------------


def test_a_config_is_what_the_yaml_says(good: Path) -> None:
    config = load(good)
    sft, dgrpo = config.stages
    assert isinstance(sft, SFT) and isinstance(dgrpo, DGRPO)
    assert config.models["small"].layout.tp == 2 and config.models["small"].layout.dp == 1
    assert sft.optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert dgrpo.optimizer.betas == (0.9, 0.99)
    assert config.teachers[0].model == "qwen3-0.6b"


def test_a_dump_loads_to_an_equal_config(good: Path, tmp_path: Path) -> None:
    config = load(good, ["stages.0.optimizer.eps=1e-20", "models.small.path='1e3'", "run_dir='runs/\\${seed}: #x'"])
    assert config.models["small"].path == "1e3" and config.run_dir == "runs/${seed}: #x"
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
    assert "clip_low: 0.2" in dump(config)  # defaults are written out


def test_overrides_set_values_by_name_and_index(good: Path) -> None:
    config = load(
        good,
        [
            "seed=7", "stages.0.steps=3", "stages.1.rewards.0.weight=2", "stages.0.optimizer.lr=5e-4",
            "models.small.layout.dp=2", "models.qwen3-0.6b.dtype=float32", "teachers=[]", "run_dir=runs/a=b",
            "stages.1.objective.advantages.std=sample", "models.other={path: x}", "seed=8",
        ],
    )  # fmt: skip
    sft, dgrpo = config.stages
    assert config.seed == 8  # the last one counts
    assert sft.steps == 3 and sft.optimizer.lr == 5e-4
    assert isinstance(dgrpo, DGRPO) and dgrpo.rewards[0].weight == 2.0
    assert dgrpo.objective.advantages.std == "sample"  # sections that the file leaves out are made
    assert config.models["small"].layout.dp == 2 and config.models["small"].layout.tp == 2
    assert config.models["qwen3-0.6b"].dtype == "float32"  # a name with a dot
    assert config.teachers == () and config.run_dir == "runs/a=b" and config.models["other"].path == "x"


def test_interpolation_sees_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGRPO_TEST_ROOT", "/data")
    text = GOOD.replace("runs/first", "${oc.env:DGRPO_TEST_ROOT}/runs/${seed}")
    config = load(written(tmp_path, text), ["seed=3"])
    assert config.run_dir == "/data/runs/3"


def test_integers_may_stand_for_floats_and_only_so(good: Path) -> None:
    assert load(good, ["collective_timeout_s=5"]).collective_timeout_s == 5.0
    assert "should be an integer; write 3" in only(good, "seed=3.0")
    assert "should be an integer; remove the quotes: 3" in only(good, "seed='3'")
    assert "should be an integer" in only(good, "stages.0.steps=true")
    assert "should be true or false" in only(good, "models.small.layout.sequence_parallel=1")
    assert "should be true or false; remove the quotes: true" in only(good, "engines.main.prefix_cache='True'")
    assert 'should be a string; quote it: "3"' in only(good, "student=3")


# ---- The file --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_config(tmp_path: Path) -> None:
    for content, said in (
        ("a: [1, 2\nb: 3\n", ":2:2: "),
        (
            "run_dir: a\nstudent: b\nrun_dir: c\n",
            ":3:1: while constructing a mapping; found duplicate key run_dir; keep",
        ),
        ("models:\n  a: {path: x, path: y}\n", "found duplicate key path"),
        ("run_dir: a\n\tstudent: b\n", "with tabs"),
        ("- a\n- b\n", "holds a list"),
        ("just words\n", "just words: unknown key"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ):
        path = written(tmp_path, content)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert said in str(caught.value) and str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


def test_an_empty_file_lists_what_it_must_have(tmp_path: Path) -> None:
    found = problems(written(tmp_path, ""))
    assert {problem.split(":")[0] for problem in found} == {"run_dir", "models", "student", "stages"}
    assert "run_dir: missing; add it (Folder for everything that the run leaves behind" in found[0]


# ---- The keys and values ---------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest(good: Path) -> None:
    assert only(good, "sed=1") == "sed: unknown key; did you mean 'seed'?"
    assert only(good, "stages.1.optimizer.learning_rat=1") == (
        "stages.1.optimizer.learning_rat: unknown key; "
        "the keys here are lr, warmup_steps, schedule, betas, eps, weight_decay, clip_grad, "
        "precision_aware, cpu_offload"
    )
    assert only(good, "lr=1") == "lr: unknown key; it belongs at stages.N.optimizer.lr"
    assert only(good, "tp=1") == "tp: unknown key; it belongs at models.NAME.layout.tp or at engines.NAME.tp"
    assert only(good, "stages.1.batch_size=1") == (
        "stages.1.batch_size: unknown key; it belongs at stages.N.batch_size of kind sft or kd"
    )
    assert only(good, "engines.main.max_model_length=1").endswith("did you mean 'max_model_len'?")


def test_parts_that_come_in_kinds_may_be_named_alone(good: Path) -> None:
    objective = "stages.1.objective"
    overrides = (
        f"{objective}.beta=0.25", f"{objective}.entropy={{kind: linear, start: 0.01, end: 0, steps: 5}}",
        f"{objective}.divergence=jsd", f"{objective}.estimator={{kind: topk_teacher, k: 4}}",
    )  # fmt: skip
    config = load(good, overrides)
    stage = config.stages[1]
    assert isinstance(stage, DGRPO)
    assert stage.objective.beta == Constant(value=0.25) and stage.objective.entropy.kind == "linear"
    assert stage.objective.divergence.alpha == 0.5 and stage.objective.estimator_name == "topk_teacher_tail"
    (good.parent / "again.yaml").write_text(dump(config))
    assert load(good.parent / "again.yaml") == config


def test_kinds_of_the_objective_that_do_not_exist_or_are_refused(good: Path) -> None:
    wrong = lambda text: only(good, f"stages.1.objective.{text}")  # noqa: E731
    assert wrong("beta=high") == (
        "stages.1.objective.beta: 'high' should be a number, 0 or more, or a mapping with a kind (a schedule)"
    )
    assert "-1 should be a number, 0 or more" in wrong("beta=-1")
    assert wrong("estimator=exat").endswith("kind 'exat' is unknown; did you mean 'exact'?")
    assert "kind 'liner' is unknown; did you mean 'linear'" in wrong("beta={kind: liner, start: 0, end: 1, steps: 2}")
    assert "k1 as a loss has expected gradient zero" in wrong("estimator=k1")
    assert "k3 as an advantage" in wrong("estimator={kind: k3_advantage}")
    assert "'adaptive' is unknown" in wrong("entropy={kind: adaptive, initial: 1, target: 1}")
    assert wrong("estimator={kind: k2, k: 4}").endswith("estimator.k of kind topk_student or topk_teacher")


def test_values_out_of_range_say_what_they_are_for(good: Path) -> None:
    assert only(good, "stages.1.group_size=1").startswith("stages.1.group_size: 1 should be greater than or equal to 2")
    assert "(Responses per prompt (G))" in only(good, "stages.1.group_size=1")
    assert only(good, "stages.0.steps=many").startswith("stages.0.steps: 'many' should be an integer")
    assert only(good, "stages.1.rewards=[]").startswith("stages.1.rewards: has 0 entries and needs at least 1")
    assert only(good, "stages=[]").startswith("stages: has 0 entries and needs at least 1")
    assert only(good, "models.small=").startswith("models.small: nothing (an empty or null value) should be a mapping")
    assert only(good, "teachers={model: small}").startswith("teachers: a mapping should be a list (")
    assert only(good, "stages.0.optimizer.lr=.nan").startswith("stages.0.optimizer.lr: nan should be")


def test_unknown_choices_name_the_nearest(good: Path) -> None:
    assert only(good, "models.small.dtype=float23") == (
        "models.small.dtype: 'float23' is unknown; did you mean 'float32'?"
    )
    assert only(good, "models.small.dtype=x").endswith("is unknown; there is 'bfloat16', 'float32', 'float64'")
    assert only(good, "stages.1.kind=dgrp") == "stages.1: kind 'dgrp' is unknown; did you mean 'dgrpo'?"
    assert (
        only(good, "stages.1.kind=x") == "stages.1: kind 'x' is unknown; there is 'dgrpo', 'grpo', 'kd', 'opd', 'sft'"
    )


def test_a_stage_of_a_misspelt_kind_is_read_on(good: Path) -> None:
    found = problems(good, "stages.1.kind=dgrp", "stages.1.group_sise=4", "stages.0.kind=ssft", "stages.0.steps=x")
    assert [problem.split(":")[0] for problem in found] == [
        "stages.0",
        "stages.1",
        "stages.0.steps",
        "stages.1.group_sise",
    ]


def test_a_stage_without_a_kind(tmp_path: Path) -> None:
    assert (
        only(written(tmp_path, GOOD.replace("kind: sft", "stesp: 3")))
        == "stages.0: kind is missing; add it: sft or kd or dgrpo or grpo or opd"
    )


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace("runs/first", "???")
        .replace("tp: 2", "tp: two", 1)
        .replace("model: small,", "model: '${nothing}',")
    )
    found = problems(written(tmp_path, text + "extra: 1\n"), "stages.0.steps", "stages.7.steps=1", "seed=-1")
    assert [problem.split(":")[0] for problem in found] == [
        "override 'stages.0.steps'", "override 'stages.7.steps=1'", "run_dir", "engines.main.model", "seed",
        "models.small.layout.tp", "extra",
    ]  # fmt: skip
    assert "write it as key=value" in found[0]
    assert "stages has entries 0 to 1, not '7'" in found[1]
    assert "add run_dir=VALUE" in found[2]
    assert "'nothing' not found" in found[3]


def test_overrides_that_cannot_be_applied(good: Path) -> None:
    for override, said in (
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("models..x=3", "write it as key=value"),
        ("stages.first.steps=3", "stages has entries 0 to 1, not 'first'"),
        ("stages.-1.steps=3", "not '-1'"),
        ("student.path=3", "student is 'small', which has no keys"),
        ("models=[1", "the value is not YAML"),
        ("models={a: 1, a: 2}", "found duplicate key a"),
    ):
        assert said in only(good, override), override

"""Contradictions between settings, and what is missing on the disk: each found, with its remedy, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config.checks import check, check_files, file_problems, problems
from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.config.stages import shaping_note
from megatron_dgrpo.errors import ConfigError


def data() -> dict[str, Any]:
    """A config without a contradiction; each test spoils a copy."""
    dataset = {"path": "data/train.jsonl"}
    reward = {"kind": "exact_match"}
    return {
        "run_dir": "runs/first",
        "student": "small",
        "models": {
            "small": {"path": "models/small", "dtype": "float32", "layout": {"tp": 2, "sequence_parallel": True}},
            "large": {"path": "models/large", "dtype": "bfloat16", "layout": {"tp": 2}},
        },
        "teachers": [{"model": "large"}],
        "engines": {"main": {"model": "small", "max_model_len": 512}},
        "evaluation": {
            "data": dataset, "engine": "main", "num_prompts": 4, "sampling": {"max_tokens": 8}, "rewards": [reward]
        },
        "stages": [
            {"kind": "sft", "data": dataset, "steps": 1, "optimizer": {"lr": 1e-3}, "batch_size": 8},
            {
                "kind": "dgrpo", "data": dataset, "steps": 1, "optimizer": {"lr": 1e-3}, "engine": "main",
                "prompts_per_step": 8, "group_size": 4, "sampling": {"max_tokens": 8}, "rewards": [reward],
            },
        ],
    }  # fmt: skip


def spoilt(*changes: tuple[str, Any]) -> Config:
    """The config with values set at dotted paths; a value of `...` removes the key."""
    spoiled = json.loads(json.dumps(data()))
    for path, value in changes:
        *parents, last = path.split(".")
        node = spoiled
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if value is ...:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return Config.model_validate(spoiled)


def only(*changes: tuple[str, Any]) -> str:
    (problem,) = problems(spoilt(*changes))
    return problem


def test_a_good_config_has_no_problem() -> None:
    assert problems(spoilt()) == []
    check(spoilt())


def test_names_that_do_not_exist_name_the_nearest() -> None:
    assert only(("teachers", [{"model": "larg"}])) == (
        "teachers.0.model: no model is called 'larg'; did you mean 'large'?"
    )
    assert problems(spoilt(("student", "smal")))[0] == "student: no model is called 'smal'; did you mean 'small'?"
    assert only(("engines.main.model", "x")) == "engines.main.model: no model is called 'x'; there is 'large', 'small'"
    assert problems(spoilt(("evaluation.engine", "man"))) == [
        "evaluation.engine: no engine is called 'man'; did you mean 'main'?"
    ]
    assert problems(spoilt(("engines", {}))) == [
        "stages.1.engine: no engine is called 'main'; there are none",
        "evaluation.engine: no engine is called 'main'; there are none",
    ]


def test_an_engine_that_does_not_serve_the_student() -> None:
    found = problems(spoilt(("engines.main.model", "large")))
    assert [problem.split(":")[0] for problem in found] == ["stages.1.engine", "evaluation.engine"]
    assert all(problem.endswith("set engines.main.model=small") for problem in found)


def test_engines_at_addresses_have_a_key_and_replicas_of_their_own() -> None:
    key, address = ("engines.main.key_file", "key"), "tcp:10.0.0.1:7001"
    assert problems(spoilt(key, ("engines.main.addresses", [address, "tcp:[::1]:7001", "unix:/run/engine"]))) == []
    assert only(("engines.main.addresses", [address])).startswith("engines.main.key_file: engines at addresses ask")
    assert only(key).startswith("engines.main.key_file: engines that the run starts have a key")
    addresses = ["tcp:10.0.0.1", address, address]
    assert problems(spoilt(key, ("engines.main.addresses", addresses), ("engines.main.replicas", 2))) == [
        "engines.main.replicas: the hosts at its addresses are its replicas; leave replicas out",
        "engines.main.addresses.0: 'tcp:10.0.0.1' is no address; write tcp:HOST:PORT or unix:/PATH",
        f"engines.main.addresses.2: {address} is listed twice; list each host once",
    ]


def test_placements_and_transports_of_engines() -> None:
    place, way = "engines.main.placement", "engines.main.transport"
    for fine in ((place, "colocated"), (way, "nccl"), (way, "wire"), (way, "shared_memory")):
        assert problems(spoilt(fine)) == []
    assert only((way, "ipc")).startswith("engines.main.transport: ipc maps the memory of GPUs that trainer and engine")
    assert only((way, "nccl"), (place, "colocated")).endswith("transport=ipc, or engines.main.placement=separate")
    (path,) = [f"stages.{i}" for i, stage in enumerate(data()["stages"]) if stage["kind"] == "dgrpo"]
    periodic = (f"{path}.schedule", {"kind": "periodic", "chunk_groups": 4})
    assert problems(spoilt(periodic)) == []
    assert only(periodic, (place, "colocated")).startswith(
        f"{path}.schedule: a periodic schedule trains while the engine"
    )


def test_fp8_engines_compute_in_bfloat16() -> None:
    fp8, dtype = ("engines.main.quantization", "fp8"), "engines.main.dtype"
    assert only(fp8).startswith("engines.main.quantization: what is not in FP8 is bfloat16")
    assert only(fp8).endswith("this engine's dtype is float32; set engines.main.dtype=bfloat16")
    assert problems(spoilt(fp8, (dtype, "bfloat16"))) == []
    assert problems(spoilt(fp8, ("models.small.dtype", "bfloat16"))) == []
    periodic = ("stages.1.schedule", {"kind": "periodic"})
    assert only(fp8, (dtype, "bfloat16"), periodic).startswith("stages.1.schedule: all ranks quantise for engine main")


def test_layouts() -> None:
    assert only(("models.small.layout", {"sequence_parallel": True}), ("models.large.layout", {})).startswith(
        "models.small.layout.sequence_parallel: needs tensor parallelism; set models.small.layout.tp=2"
    )
    assert problems(spoilt(("models.large.layout", {"tp": 1, "dp": 2}))) == []  # a teacher has a layout of its own
    assert only(("models.large.layout", {"vpp": 2})).startswith(
        "models.large.layout.vpp: 2 parts of a pipeline stage, and there is no pipeline; set models.large.layout.pp=2"
    )
    assert only(("models.large.layout", {"tp": 2, "ep": 4})).startswith(
        "models.large.layout.ep: etp x ep = 4 does not divide tp x cp x dp = 2, the ranks of a stage"
    )
    assert only(("models.small.fp8", "blockwise")).endswith("set models.small.dtype=bfloat16")
    assert only(("models.large.fp8", "blockwise"), ("models.large.layers", "local")).endswith(
        "set models.large.layers=te, or models.large.fp8=null"
    )
    offload = ("models.large.offload_layers", 1)
    assert problems(spoilt(offload)) == []
    found = problems(
        spoilt(
            offload,
            ("models.large.layers", "local"),
            ("models.large.layout", {"pp": 2}),
            ("models.large.recompute", "full"),
        )
    )
    assert [problem.split("; set ")[1] for problem in found] == [
        f"models.large.{setting}, or models.large.offload_layers=0"
        for setting in ("layers=te", "layout.pp=1", "recompute=none")
    ]


def test_ranks_of_a_run() -> None:
    def num_ranks(*changes: tuple[str, Any]) -> int:
        return spoilt(*changes).num_ranks

    assert num_ranks() == 2
    assert num_ranks(("models.large.layout", {"tp": 2, "pp": 2})) == 4
    assert (
        num_ranks(("models.large.layout", {"tp": 2, "pp": 2}), ("teachers", [{"model": "large", "ranks": "own"}])) == 6
    )
    several = [{"model": "large", "ranks": "own"}, {"model": "shared"}, {"model": "last", "ranks": "own"}]
    layouts = {"large": {"tp": 2}, "shared": {"dp": 4}, "last": {"pp": 3}}
    models = [(f"models.{name}", {"path": name, "layout": layout}) for name, layout in layouts.items()]
    config = spoilt(*models, ("teachers", several))
    assert config.first_ranks == (4, 0, 6, 9) and config.num_ranks == 9  # after those that students and teachers share


def test_teachers_and_beta() -> None:
    assert only(("teachers", [])).startswith("stages.1.objective.beta: the KL needs a teacher; add teachers")
    assert problems(spoilt(("teachers", []), ("stages.1.objective", {"beta": 0}))) == []
    assert only(("stages.1.objective", {"beta": 0})).startswith(
        "teachers: listed, but no stage uses one (every dgrpo stage has objective.beta 0); set teachers=[]"
    )
    assert "there is no dgrpo, opd or kd stage" in only(("stages", data()["stages"][:1]))
    assert only(("teachers", [{"model": "large"}, {"model": "large"}])) == (
        "teachers: 'large' is listed 2 times; list it once"
    )
    two = [{"model": "large"}, {"model": "small"}]
    assert only(("teachers", two)).startswith("stages.1.data.teacher: 2 teachers are listed, and nothing says which")
    routed = ("stages.1.data.teacher", "teacher")
    assert problems(spoilt(("teachers", two), routed)) == []
    assert only(("teachers", []), routed, ("stages.1.objective", {"beta": 0})) == (
        "stages.1.data.teacher: this stage has no teacher; remove it, or set stages.1.objective.beta above 0"
    )


def test_a_stage_that_learns_nothing() -> None:
    nothing = [{"kind": "exact_match", "weight": 0.0}]
    assert problems(spoilt(("stages.1.rewards", nothing))) == []  # distillation alone
    found = problems(spoilt(("stages.1.rewards", nothing), ("stages.1.objective", {"beta": 0}), ("teachers", [])))
    assert len(found) == 1 and "nothing is learnt" in found[0]


def test_objectives_that_cannot_be_trained_on() -> None:
    key = "stages.1.objective"
    assert only((f"{key}.estimator", "k3")).startswith(f"{key}.estimator: k3 as a loss has the gradient of the forward")
    assert problems(spoilt((f"{key}.estimator", "k3"), (f"{key}.divergence", "forward_kl"))) == []
    assert "jsd has no estimator 'k2': it has exact" in only((f"{key}.estimator", "k2"), (f"{key}.divergence", "jsd"))
    fast = {"kind": "adaptive", "initial": 1e3, "target": 0.1, "rate": 10}
    found = problems(spoilt((f"{key}.beta", fast)))
    assert [problem.split(":")[0] for problem in found] == [f"{key}.beta.initial", f"{key}.beta.rate"]
    assert only((f"{key}.advantages", {"kind": "mean", "std": "sample"})).endswith("not to mean; remove them")
    never = {"kind": "linear", "start": 0.0, "end": 0.0, "steps": 3}
    assert "teachers: listed" in only((f"{key}.beta", never))
    assert problems(spoilt((f"{key}.beta", never | {"end": 0.1}))) == []


def test_batches_must_divide() -> None:
    assert only(("stages.1.updates_per_batch", 3)).endswith(
        "set stages.1.updates_per_batch=2 or stages.1.prompts_per_step=9"
    )
    assert only(("stages.1.updates_per_batch", 16)).endswith(
        "set stages.1.updates_per_batch=8 or stages.1.prompts_per_step=16"
    )
    assert problems(spoilt(("stages.1.updates_per_batch", 8))) == []


def test_lengths_must_fit() -> None:
    assert only(("stages.1.sampling.max_tokens", 512)).startswith(
        "stages.1.sampling.max_tokens: 512 leaves no room for a prompt in engines.main.max_model_len=512"
    )
    assert problems(spoilt(("stages.1.sampling.max_tokens", 511))) == []
    assert only(("evaluation.sampling.max_tokens", 600)).startswith("evaluation.sampling.max_tokens: 600")
    assert "stages.1.micro_batch_tokens=512 or more" in only(("stages.1.micro_batch_tokens", 511))
    assert problems(spoilt(("stages.1.micro_batch_tokens", 512), ("stages.0.micro_batch_tokens", 2))) == []
    assert only(("stages.0.micro_batch_tokens", 1)).startswith("stages.0.micro_batch_tokens: ")


def test_room_is_what_padding_leaves() -> None:
    """The student's unit is 2 (its layout cuts the sequence in 2), and FP8 blocks of 128 make it 256."""
    assert problems(spoilt(("engines.main.max_model_len", 510), ("stages.1.micro_batch_tokens", 511))) == []
    problem = only(("engines.main.max_model_len", 511), ("stages.1.micro_batch_tokens", 511))
    assert problem == (
        "stages.1.micro_batch_tokens: 511 (padded micro-batches are multiples of 2, so that 510 are of use) "
        "cannot hold "
        "the longest sequence that the engine may return; set stages.1.micro_batch_tokens=512 or more, or "
        "engines.main.max_model_len=510 or less, or stages.1.on_overlong=drop"
    )
    fp8 = [("models.small.fp8", "blockwise"), ("models.small.dtype", "bfloat16"), ("engines.main.max_model_len", 600)]
    assert "stages.1.micro_batch_tokens=768 or more" in only(*fp8, ("stages.1.micro_batch_tokens", 700))
    assert "200 (padded" in only(*fp8, ("stages.0.micro_batch_tokens", 200))  # no sequence fits at all
    teacher = [("models.large.fp8", "mxfp8"), ("engines.main.max_model_len", 600), ("stages.1.micro_batch_tokens", 600)]
    assert "stages.1.micro_batch_tokens=608 or more" in only(*teacher)  # it packs the same sequences
    assert problems(spoilt(*teacher, ("stages.1.objective", {"beta": 0}), ("teachers", []))) == []


def test_rewards_have_names_of_their_own() -> None:
    twice = [{"kind": "exact_match"}, {"kind": "exact_match", "weight": 0.5}]
    assert only(("stages.1.rewards", twice)) == (
        "stages.1.rewards: 2 are called 'exact_match'; give each a name of its own (stages.1.rewards.N.name), or list "
        "it once with the sum of the weights"
    )
    assert only(("evaluation.rewards", twice)).startswith("evaluation.rewards: 2 are called 'exact_match'")
    assert problems(spoilt(("stages.1.rewards", [twice[0], twice[1] | {"name": "again"}]))) == []
    assert "'exact_match'" in only(("stages.1.rewards", [twice[0], {"kind": "token_f1", "name": "exact_match"}]))


def test_what_compares_needs_an_answer() -> None:
    bare = ("stages.1.data.answer", None)
    assert "exact_match compares with the answer, and data/train.jsonl has none" in only(bare)
    for reward in ({"kind": "regex", "pattern": "a"}, {"kind": "token_f1", "reference": "summary"}):
        assert problems(spoilt(bare, ("stages.1.rewards", [reward]))) == []


def test_settings_of_a_reward_must_agree() -> None:
    def found(**reward: Any) -> list[str]:
        said = problems(spoilt(("stages.1.rewards", [reward])))
        assert all(problem.startswith("stages.1.rewards.0.") for problem in said)
        return [problem.removeprefix("stages.1.rewards.0.") for problem in said]

    assert "is no regular expression (missing )" in found(kind="regex", pattern="(a")[0]
    assert found(kind="regex", pattern="a", equals_reference=True) == [
        "pattern: 'a' has no group; put what is compared or read in parentheses"
    ]
    assert "reference: the pattern alone decides" in found(kind="regex", pattern="a", reference="x")[0]
    assert "constraints: there are none" in found(kind="instructions")[0]
    assert found(kind="instructions", field="rules") == []
    short = {"kind": "length", "at_least": 3, "at_most": 2}
    assert "constraints.0.at_most: 2 is less" in found(kind="instructions", constraints=[short])[0]
    judge = {"kind": "judge", "url": "http://localhost:8000/v1", "model": "m"}
    assert found(**judge) == []
    wrong = found(**judge, template="{answer} {text}", lowest=1, pattern="x")
    assert [problem.split(":")[0] for problem in wrong] == ["pattern", "template", "template", "highest"]
    assert "braces" not in wrong[1] and "{text} is unknown" in wrong[1] and "does not show the response" in wrong[2]
    assert "write a brace that is meant as such twice" in found(**judge, template="{response} {")[0]


def test_engines_do_not_compute_in_float64() -> None:
    assert only(("models.small.dtype", "float64")).endswith("set engines.main.dtype=float32")
    assert problems(spoilt(("models.small.dtype", "float64"), ("engines.main.dtype", "float32"))) == []
    assert problems(spoilt(("models.large.dtype", "float64"))) == []  # a teacher has no engine


def test_numbers_and_paths_that_mean_nothing() -> None:
    infinite = Config.model_validate(data() | {"collective_timeout_s": float("inf")})
    assert problems(infinite) == ["collective_timeout_s: inf is no finite number; give one"]
    assert only(("run_dir", "~/runs")).endswith("write ${oc.env:HOME} or the whole path")
    assert only(("stages.0.data.path", " ")) == "stages.0.data.path: empty; give a path"
    assert only(("stages.0.optimizer.betas", [0.9, 1.0])).startswith("stages.0.optimizer.betas.1: 1.0 is not in [0, 1)")


def test_all_contradictions_are_one_error() -> None:
    config = spoilt(("student", "smal"), ("stages.1.updates_per_batch", 3), ("evaluation.engine", "x"))
    with pytest.raises(ConfigError) as caught:
        check(config)
    lines = str(caught.value).splitlines()[1:]
    assert {line.split(":")[0] for line in lines} >= {
        "  - student", "  - stages.1.updates_per_batch", "  - evaluation.engine",
    }  # fmt: skip


# ---- The disk --------------------------------------------------------------------------------------------------------


TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<eos>"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which everything that the config names is there, as the current one."""
    for name in ("small", "large"):
        model = tmp_path / "models" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "qwen3"}')
        (model / "model.safetensors").write_bytes(b"")
        (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_good_files(folder: Path) -> None:
    assert file_problems(spoilt()) == []
    check_files(spoilt())
    (folder / "runs" / "first").mkdir(parents=True)
    assert file_problems(spoilt()) == []  # an empty folder is as good as none


def test_missing_files_are_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_files(spoilt(("stages.1.updates_per_batch", 3)))
    lines = [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]
    assert [line.split(":")[0] for line in lines] == [
        "stages.1.updates_per_batch", "models.small.path", "models.large.path",
        "stages.0.data.path", "stages.1.data.path", "evaluation.data.path",
    ]  # fmt: skip
    assert f"models/small does not exist (looked from {tmp_path})" in lines[1]


def test_incomplete_model_folders(folder: Path) -> None:
    small, large = folder / "models" / "small", folder / "models" / "large"
    (small / "config.json").unlink()
    (small / "tokenizer.json").unlink()
    (small / "model.safetensors").rename(small / "pytorch_model.bin")
    (large / "config.json").write_text("{")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model.safetensors"}}
    (large / "model.safetensors.index.json").write_text(json.dumps(index))
    found = "\n".join(file_problems(spoilt()))
    assert "models.small.path: models/small/config.json does not exist" in found
    assert "models/small has no *.safetensors; convert the pickled weights" in found
    assert "models/small has no tokenizer (tokenizer.json" in found
    assert "models.large.path: models/large/config.json cannot be read" in found
    assert "names model-1.safetensors, model-2.safetensors, which models/large lacks" in found


def test_a_config_json_of_something_else(folder: Path) -> None:
    (folder / "models" / "small" / "config.json").write_text('{"name": "x"}')
    (folder / "models" / "large" / "config.json").write_text("[]")
    first, second = file_problems(spoilt())
    assert "names no architecture" in first and "holds no JSON object" in second


def test_tokenizers_must_agree_on_the_students_ids(folder: Path) -> None:
    theirs = folder / "models" / "large" / "tokenizer.json"
    more = json.loads(json.dumps(TOKENIZER))
    more["model"]["vocab"]["c"] = 3
    theirs.write_text(json.dumps(more))
    assert file_problems(spoilt()) == []  # ids that the student never samples
    swapped = {"model": {"vocab": {"b": 0, "a": 1}}, "added_tokens": TOKENIZER["added_tokens"]}
    theirs.write_text(json.dumps(swapped))
    (problem,) = file_problems(spoilt())
    assert problem.startswith("models.large.path: 2 of the student's 3 token ids mean something else")
    assert "(id 0: 'a' to the student, 'b' to the teacher)" in problem
    theirs.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (problem,) = file_problems(spoilt())
    assert "(id 2: '<eos>' to the student, None to the teacher)" in problem


def test_tokenizers_of_other_forms_are_compared_by_their_bytes(folder: Path) -> None:
    for name, content in (("small", b"pieces"), ("large", b"pieces")):
        (folder / "models" / name / "tokenizer.json").unlink()
        (folder / "models" / name / "tokenizer.model").write_bytes(content)
    assert file_problems(spoilt()) == []
    (folder / "models" / "large" / "tokenizer.model").write_bytes(b"other")
    (problem,) = file_problems(spoilt())
    assert problem.startswith("models.large.path: tokenizer.model differs from the student's")
    (folder / "models" / "large" / "tokenizer.model").rename(folder / "models" / "large" / "vocab.json")
    (problem,) = file_problems(spoilt())
    assert "cannot be compared" in problem


PLACES = ("stages.0.data", "stages.1.data", "evaluation.data")


def test_data_that_is_no_file(folder: Path) -> None:
    (folder / "data" / "train.jsonl").write_text("")
    assert all("is empty" in problem for problem in file_problems(spoilt()))
    (problem,) = file_problems(spoilt(("stages", data()["stages"]), ("stages.0.data.path", "data")))[:1]
    assert problem.startswith("evaluation.data.path: data/train.jsonl is empty")
    (folder / "data" / "train.jsonl").rename(folder / "data" / "train.txt")
    assert "does not exist" in file_problems(spoilt())[0]
    (problem,) = file_problems(spoilt(*[(f"{place}.path", "data/train.txt") for place in PLACES]))[:1]
    assert "data/train.txt ends in none of .jsonl, .parquet" in problem
    (problem,) = file_problems(spoilt(*[(f"{place}.path", "data") for place in PLACES]))[:1]
    assert problem.startswith("stages.0.data.path: data has no file that ends in .jsonl or .parquet")


def test_run_dir(folder: Path) -> None:
    (folder / "runs" / "first" / "logs").mkdir(parents=True)
    (folder / "runs" / "first" / "logs" / "rank0.log").write_text("it failed")
    (folder / "runs" / "first" / "config.yaml").write_text("")
    assert file_problems(spoilt()) == []  # a run that failed before its first step may be tried again
    (folder / "runs" / "first" / "metrics.jsonl").write_text("{}")
    (problem,) = file_problems(spoilt())
    assert problem.startswith("run_dir: runs/first is not empty, and no run's folder")
    (folder / "runs" / "first" / "environment.json").write_text("{}")
    assert file_problems(spoilt()) == []  # it goes on
    (problem,) = file_problems(spoilt(("run_dir", "data/train.jsonl")))
    assert problem.startswith("run_dir: data/train.jsonl is no folder")
    (problem,) = file_problems(spoilt(("run_dir", "data/train.jsonl/below")))
    assert "cannot be made" in problem and "train.jsonl is no folder" in problem


def test_the_time_limit_leaves_room_for_saving() -> None:
    problem = only(("checkpoints.time_limit_s", 200))
    assert problem.startswith("checkpoints.margin_s: 300 leaves nothing of time_limit_s=200")
    assert not problems(spoilt(("checkpoints.time_limit_s", 200), ("checkpoints.margin_s", 60)))


def test_corrections_and_limits_of_the_mismatch() -> None:
    problem = only(("stages.1.objective.correction", {"kind": "masked", "low": 1.5}))
    assert problem.startswith("stages.1.objective.correction: a ratio of 1 is outside of low=1.5 and high=5")
    assert not problems(spoilt(("stages.1.objective.correction", "masked")))
    problem = only(("stages.1.mismatch", {"warn": {"p99": 2}, "stop": {"p99": 1}}))
    assert problem.startswith("stages.1.mismatch.warn.p99: 2 is above stop.p99=1")
    assert not problems(spoilt(("stages.1.mismatch", {"stop": {"k3": 1e-3}})))  # the default of warn gives way


def test_shaped_sampling_is_refused_where_the_kl_is_over_the_whole_distribution() -> None:
    shaped = ("stages.1.sampling.top_p", 0.9), ("stages.1.sampling.presence_penalty", 0.5)
    problem = only(*shaped)
    assert (
        problem.startswith("stages.1.sampling: top_p=0.9, presence_penalty=0.5 changes")
        and "estimator exact" in problem
    )
    for estimator in ("topk_student", "topk_teacher", {"kind": "sampled", "baseline": True}):
        assert "no such mask" in only(*shaped, ("stages.1.objective.estimator", estimator))
    for estimator in ("sampled", "k2"):
        config = spoilt(*shaped, ("stages.1.objective.estimator", estimator))
        assert not problems(config)
        assert "top_p=0.9, presence_penalty=0.5" in shaping_note(config.stages[1])
    assert not problems(spoilt(*shaped, ("stages.1.objective.beta", 0), ("teachers", [])))
    for name, value in (("top_k", 5), ("min_p", 0.1), ("frequency_penalty", 1), ("repetition_penalty", 1.2)):
        assert f"{name}={value}" in only((f"stages.1.sampling.{name}", value))
        assert not problems(spoilt((f"evaluation.sampling.{name}", value)))
    assert shaping_note(spoilt().stages[1]) == ""


def test_a_step_of_an_engine_has_place_for_each_of_its_sequences() -> None:
    problem = only(("engines.main.chunked_prefill", 128))
    assert problem.startswith("engines.main.chunked_prefill: a step of 128 tokens") and "max_num_seqs=256" in problem
    assert not problems(spoilt(("engines.main.chunked_prefill", 128), ("engines.main.max_num_seqs", 128)))

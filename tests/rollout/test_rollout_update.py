"""After a weight transfer, the same engine process answers like a fresh engine on the exported folder; and the check
that shows it fails when a tensor or the reset of the prefix cache is withheld."""

import copy
import glob

import numpy as np
import pytest
from rollout_support import (
    difference,
    engine_host,
    fresh,
    greedy,
    make_engine,
    push_folder,
    run_engine,
    whole_tensors,
)

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout.checksum import checksum
from megatron_dgrpo.rollout.messages import BeginUpdate, LoadBucket, TensorSpec
from megatron_dgrpo.testing.distributed import run_distributed, run_forked

TOLERANCE = 1e-4


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_three_updates_from_two_ranks(kind, request):
    folders = request.getfixturevalue(f"{kind}_folders")
    requests = greedy()
    with engine_host(folders[0]) as host:
        before = host.client.describe()
        assert (before.weight_version, before.whole, before.block_size) == (0, True, 128)
        answers = [host.answers(requests)]
        assert difference(answers[0], fresh(folders[0], requests)) <= TOLERANCE
        for version in (1, 2, 3):
            assert run_distributed(push_folder, 2, folders[version], host.address, host.key, version) == ["", ""]
            info = host.client.describe()
            assert (info.pid, info.weight_version, info.whole) == (before.pid, version, True)
            completions = list(host.client.generate(requests, deadline_s=60))
            assert all((c.weight_versions == version).all() and len(c.weight_versions) for c in completions)
            answers.append(host.answers(requests))
            assert difference(answers[-1], fresh(folders[version], requests)) <= TOLERANCE
        assert all(difference(a, b) > 1 for i, a in enumerate(answers) for b in answers[:i])
    assert glob.glob("/dev/shm/dgrpo-push-*") == []


def test_a_tensor_that_no_rank_sends_leaves_the_engine_refusing(untied_folders):
    name = "model.layers.1.mlp.down_proj.weight"
    with engine_host(untied_folders[0]) as host:
        old = host.answers(greedy())
        errors = run_distributed(push_folder, 2, untied_folders[1], host.address, host.key, 1, [name])
        assert all(f"{name}: " in error and "were written by no rank" in error for error in errors)
        assert not host.client.describe().whole
        with pytest.raises(RolloutError, match="not whole"):
            host.answers(greedy())
        # the next update is whole again, even to the version that it had
        assert run_distributed(push_folder, 2, untied_folders[0], host.address, host.key, 2) == ["", ""]
        assert difference(host.answers(greedy()), old) <= TOLERANCE


def test_a_manifest_of_another_model_changes_nothing(untied_folders, tied_folders):
    with engine_host(untied_folders[0]) as host:
        old = host.answers(greedy())
        for error in run_distributed(push_folder, 2, tied_folders[1], host.address, host.key, 1):
            assert "lm_head.weight: it is missing" in error
        specs = [
            TensorSpec("lm_head.weight", (160, 64), "float32"),
            TensorSpec("model.norm.weight", (64,), "bfloat16"),
            TensorSpec("model.layers.7.mlp.up_proj.weight", (96, 64), "float32"),
        ]
        with pytest.raises(TransferError) as caught:
            host.client.begin_update(1, specs, "/dev/shm/nothing", 64, deadline_s=60)
        for part in (
            "lm_head.weight: its shape is [160, 64], the engine has [161, 64]",
            "model.norm.weight: it is bfloat16, the engine has float32",
            "model.layers.7.mlp.up_proj.weight: the model has no such tensor",
            "model.embed_tokens.weight: it is missing",
            "model.layers.0.self_attn.q_norm.weight: it is missing",
        ):
            assert part in str(caught.value)
        info = host.client.describe()
        assert info.whole and info.weight_version == 0
        assert difference(host.answers(greedy()), old) <= TOLERANCE


# ---- with the engine in the test's own process, where parts can be withheld ----


def push_in_process(engine, folder, version, path, leave_out=()):
    """All tensors in one bucket, by the engine's own methods."""
    tensors = whole_tensors(folder)
    offsets, position = {}, 0
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            offsets[name] = position
            position += file.write(tensor.numpy().tobytes())
    specs = tuple(TensorSpec(n, tuple(t.shape), "float32") for n, t in tensors.items())
    engine.begin_update(BeginUpdate(0, version, specs, path, position))
    sent = [name for name in tensors if name not in leave_out]
    engine.load_bucket(LoadBucket(0, tuple(sent), tuple(offsets[n] for n in sent), ()))
    engine.finish_update(version)


def every_withheld_tensor(folders, path):
    """For each tensor: was it refused, and with the refusal disabled, how far off were the answers?"""
    from megatron_dgrpo.rollout.shm_engine import SharedMemoryWeightTransferEngine as Transfer

    engine, requests = make_engine(folders[0]), greedy()
    push_in_process(engine, folders[1], 1, path)
    good = run_engine(engine, requests)
    finish, found = Transfer.finish_weight_update, {}
    for name in whole_tensors(folders[0]):
        push_in_process(engine, folders[0], 2, path)
        try:
            push_in_process(engine, folders[1], 3, path, [name])
            refused = ""
        except TransferError as error:
            refused = str(error)
        whole = engine.whole
        Transfer.finish_weight_update = lambda self: (self._next_row.clear(), finish(self))
        push_in_process(engine, folders[0], 4, path)
        push_in_process(engine, folders[1], 5, path, [name])
        Transfer.finish_weight_update = finish
        found[name] = (refused, whole, difference(run_engine(engine, requests), good))
    return found, good


@pytest.mark.parametrize(("kind", "num_tensors"), [("tied", 24), ("untied", 25), ("moe", 45)])
def test_each_withheld_tensor_is_refused_and_would_be_noticed(kind, num_tensors, request, tmp_path):
    folders = request.getfixturevalue(f"{kind}_folders")
    found, good = run_forked(every_withheld_tensor, folders, str(tmp_path / "file"), preload="engine")
    assert difference(good, fresh(folders[1], greedy())) <= TOLERANCE
    assert len(found) == num_tensors
    for name, (refused, whole, off) in found.items():
        assert name in refused and "never came" in refused and not whole
        assert off > TOLERANCE, name


def _keep_an_old_head(worker):
    """The head as a copy of its own, which no update reaches."""
    model = worker.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = copy.deepcopy(model.lm_head.weight)


def with_an_old_head(folders, path):
    from megatron_dgrpo.rollout import loading

    engine, requests = make_engine(folders[0]), greedy()
    push_in_process(engine, folders[1], 1, path)
    good = run_engine(engine, requests)
    push_in_process(engine, folders[0], 2, path)
    engine.llm.collective_rpc(_keep_an_old_head)
    try:
        push_in_process(engine, folders[1], 3, path)
        refused = ""
    except TransferError as error:
        refused = str(error)
    whole = engine.whole
    loading._unfilled = lambda *_: []
    push_in_process(engine, folders[1], 4, path)
    return refused, whole, difference(run_engine(engine, requests), good)


def test_a_tied_head_that_would_stay_behind_is_refused_and_would_be_noticed(tied_folders, tmp_path):
    path = str(tmp_path / "file")
    refused, whole, off = run_forked(with_an_old_head, tied_folders, path, preload="engine")
    assert "parts of the engine's model old:\n  - lm_head.weight: " in refused and whole
    assert off > 0.01


def without_cache_reset(folders, path):
    engine, requests = make_engine(folders[0]), greedy()
    run_engine(engine, requests)
    reset = engine.llm.reset_prefix_cache
    engine.llm.reset_prefix_cache = lambda: True
    push_in_process(engine, folders[1], 1, path)
    stale = run_engine(engine, requests)
    engine.llm.reset_prefix_cache = lambda: False  # what vLLM answers while a request holds blocks
    try:
        push_in_process(engine, folders[1], 2, path)
        refused = ""
    except TransferError as error:
        refused = str(error)
    whole = engine.whole
    engine.llm.reset_prefix_cache = reset
    push_in_process(engine, folders[1], 3, path)
    return stale, refused, whole, run_engine(engine, requests)


def test_without_the_reset_of_the_prefix_cache_the_check_fails(untied_folders, tmp_path):
    path = str(tmp_path / "file")
    stale, refused, whole, good = run_forked(without_cache_reset, untied_folders, path, preload="engine")
    right = fresh(untied_folders[1], greedy())
    assert difference(good, right) <= TOLERANCE
    assert difference(stale, right) > 0.01
    assert "prefix cache could not be reset" in refused and not whole


def experts(folders, path):
    from megatron_dgrpo.rollout.shm_engine import SharedMemoryWeightTransferEngine as Transfer

    engine, requests = make_engine(folders[0]), greedy()
    push_in_process(engine, folders[1], 1, path)
    packed_again = run_engine(engine, requests)
    push_in_process(engine, folders[0], 2, path)
    Transfer._pack_experts = lambda self: None
    push_in_process(engine, folders[1], 3, path)
    return packed_again, run_engine(engine, requests)


def test_experts_are_packed_again(moe_folders, tmp_path):
    packed_again, not_packed = run_forked(experts, moe_folders, str(tmp_path / "file"), preload="engine")
    right = fresh(moe_folders[1], greedy())
    assert difference(packed_again, right) <= TOLERANCE
    assert difference(not_packed, right) > 0.01


def faulty_buckets(folder, path):
    """What a client may get wrong about a bucket; the engine's answers, and whether it was whole afterwards."""
    engine = make_engine(folder)
    tensors = whole_tensors(folder)
    name, tensor = "model.norm.weight", whole_tensors(folder)["model.norm.weight"]
    with open(path, "wb") as file:
        file.write(tensor.numpy().tobytes())
    specs = tuple(TensorSpec(n, tuple(t.shape), "float32") for n, t in tensors.items())
    good, answers = checksum(tensor), []

    def trial(begin, *loads):
        try:
            engine.begin_update(begin)
            for load in loads:
                engine.load_bucket(load)
            answers.append(("", engine.whole))
        except TransferError as error:
            answers.append((str(error), engine.whole))
        engine.abandon_update()
        answers[-1] += (engine.whole,)

    begin = BeginUpdate(0, 1, specs, path, 256)
    trial(BeginUpdate(0, 1, specs, path + ".not", 256))
    trial(BeginUpdate(0, 1, specs, path, 257))
    trial(BeginUpdate(0, 1, (*specs, specs[0]), path, 256))
    trial(begin)
    trial(begin, LoadBucket(0, (name,), (4,), ()))
    trial(begin, LoadBucket(0, (name,), (-4,), ()))
    trial(begin, LoadBucket(0, ("model.norm.bias",), (0,), ()))
    trial(begin, LoadBucket(0, (name,), (0,), (good ^ 1,)))
    trial(begin, LoadBucket(0, (name,), (0,), (good,)), LoadBucket(0, (name,), (0,), (good,)))
    trial(begin, LoadBucket(0, (name,), (0,), (), (0,), (65,)))
    trial(begin, LoadBucket(0, (name,), (0,), (), (32,), (64,)))
    trial(begin, LoadBucket(0, (name,), (0,), (), (0,), (32,)), LoadBucket(0, (name,), (128,), (), (32,), (64,)))
    trial(begin, LoadBucket(0, (name,), (0,), (good,)))
    return answers


def test_faulty_buckets(untied_folders, tmp_path):
    answers = run_forked(faulty_buckets, untied_folders[0], str(tmp_path / "file"), preload="engine")
    expected = [
        ("cannot open", True, True),
        ("has fewer than the 257 bytes", True, True),
        ("some names are there twice", True, True),
        ("", False, True),  # it was begun and given up before a byte moved
        ("model.norm.weight would lie outside of the file, at 4", False, False),
        ("model.norm.weight would lie outside of the file, at -4", False, False),
        ("not announced, or came before:\n  - model.norm.bias", False, False),
        ("did not arrive as they were sent (checksums differ):\n  - model.norm.weight", False, False),
        ("not announced, or came before:\n  - model.norm.weight", False, False),
        ("model.norm.weight has no rows 0 to 65", False, False),
        ("model.norm.weight: its rows from 32 on came, which is not where it was left", False, False),
        ("", False, False),
        ("", False, False),
    ]
    assert len(answers) == len(expected)
    for (error, *whole), (text, *whole_expected) in zip(answers, expected, strict=True):
        assert text in error and bool(text) == bool(error)
        assert whole == whole_expected, error


def in_bfloat16(folder, path):
    """A float32 update is refused by a bfloat16 engine, whose weights are really bfloat16."""
    engine = make_engine(folder, dtype="bfloat16")
    try:
        push_in_process(engine, folder, 1, path)
    except TransferError as error:
        return str(error), engine.whole, engine.info().dtype
    return "", engine.whole, ""


def test_another_dtype_is_refused(untied_folders, tmp_path):
    error, whole, dtype = run_forked(in_bfloat16, untied_folders[0], str(tmp_path / "file"), preload="engine")
    assert "lm_head.weight: it is float32, the engine has bfloat16: give both sides one dtype" in error
    assert (whole, dtype) == (True, "bfloat16")


def test_answers_differ_between_versions(untied_folders):
    """The comparison would see an update that did nothing."""
    answers = [fresh(folder, greedy(1)) for folder in untied_folders[:2]]
    assert difference(*answers) > TOLERANCE
    assert np.isinf(difference(answers[0], {k: (t + 1, p) for k, (t, p) in answers[0].items()}))

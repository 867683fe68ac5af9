"""Packed weights: products, forms, and engines that answer to the bit like fresh ones after an update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rollout_support import difference, greedy, make_engine, run_engine, whole_tensors

from megatron_dgrpo.errors import TransferError
from megatron_dgrpo.rollout.messages import BeginUpdate, LoadBucket, TensorSpec
from megatron_dgrpo.rollout.packed_linear import Form, PackedWeight, pack, packed_weights
from megatron_dgrpo.testing.distributed import run_forked

DTYPES = [torch.float32, torch.bfloat16]


def layer(weight: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(weight=torch.nn.Parameter(weight.clone(), requires_grad=False))


def packed(one: SimpleNamespace, in_place: bool = True) -> PackedWeight:
    found = pack(one, in_place)
    if found is None:
        pytest.skip("oneDNN packs otherwise on this processor, so weights stay plain")
    return found


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (9,), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype, rows, in_place):
    weight, bias, x = draw(192, 64, dtype=dtype), draw(192, dtype=dtype, seed=1), draw(*rows, 64, dtype=dtype, seed=2)
    one = layer(weight)
    linear = packed(one, in_place)
    assert torch.equal(one.weight, weight) is not in_place and one.weight.shape == weight.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for given in (None, bias):
        right = x.double() @ weight.double().T + (0 if given is None else given.double())
        for form in (x, torch.stack([x, x], -1)[..., 0]):  # the second is not contiguous
            found = linear(form, one.weight, given)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rows", "columns", "in_place"), [(192, 64, True), (192, 64, False), (64, 160, True), (97, 96, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_bytes_through_views_that_were_there_before(dtype, rows, columns, in_place):
    old, new = draw(rows, columns, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    x = draw(9, columns, dtype=dtype, seed=2)
    one, right = layer(old), layer(new)
    linear = packed(one, in_place)
    upper, lower = one.weight.data[: rows // 2], one.weight.data[rows // 2 :]
    before = linear(x, one.weight, None)
    linear.tear()
    upper.copy_(new[: rows // 2])
    with pytest.raises(TransferError, match="parts of two versions"):
        linear(x, one.weight, None)
    lower.copy_(new[rows // 2 :])
    linear.whole()
    assert torch.equal(one.weight, new) and linear.form is Form.PLAIN
    after = linear(x, one.weight, None)
    assert torch.equal(after, packed(right, in_place)(x, right.weight, None)) and not torch.equal(after, before)
    assert torch.equal(one.weight, right.weight)  # both packed, or both plain beside the packed form
    assert linear.form is Form.PACKED and linear.times_packed == 2


def test_an_update_that_was_begun_and_given_up_before_a_byte_packs_nothing_again():
    linear = packed(layer(draw(64, 64, dtype=torch.float32)))
    linear.whole()
    assert linear.form is Form.PACKED and linear.times_packed == 1


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(97, 64),  # the last block is not full
        torch.randn(64, 64, dtype=torch.float64),
        torch.randn(64, 64, device="meta"),
        torch.randn(64, 128)[:, :64],
        torch.randn(64, 63).to(torch.bfloat16),  # half a word
        torch.zeros(64, 64),  # it looks the same in every form
    ],
)
def test_what_stays_plain(weight):
    one = SimpleNamespace(weight=weight)
    assert pack(one, True) is None and one.weight is weight


# ---- engines ----


def push_in_bfloat16(engine, folder, version, path, only=None):
    """All tensors in one bucket; or some, and the update is left there."""
    tensors = {name: t.bfloat16() for name, t in whole_tensors(folder).items()}
    offsets, position = {}, 0
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            offsets[name] = position
            position += file.write(tensor.view(torch.uint8).numpy().tobytes())
    specs = tuple(TensorSpec(n, tuple(t.shape), "bfloat16") for n, t in tensors.items())
    engine.begin_update(BeginUpdate(0, version, specs, path, position))
    sent = tuple(only or tensors)
    engine.load_bucket(LoadBucket(0, sent, tuple(offsets[n] for n in sent), ()))
    if only:
        engine.abandon_update()
    else:
        engine.finish_update(version)


def forms_of(worker):
    """Of every linear layer: its name, the form of its weight, how often it was packed, where and what it is."""
    found = {}
    for name, module in worker.model_runner.model.named_modules():
        linear = vars(module).get("cpu_linear")
        if isinstance(linear, PackedWeight):
            weight = module.weight
            found[name] = (linear.form.name, linear.times_packed, linear.in_place, weight.data_ptr())
    return found


def multiply_once(worker):
    """A product with the first packed layer."""
    linear = packed_weights(worker.model_runner.model)[0]
    linear(torch.zeros(1, 64, dtype=torch.bfloat16), None, None)


def updates(folders, path):
    engine, requests, seen = make_engine(folders[0], dtype="bfloat16"), greedy(), []

    def look(what):
        (forms,) = engine.llm.collective_rpc(forms_of)
        seen.append((what, forms, engine.whole))

    look("loaded")
    answers = [run_engine(engine, requests)]
    push_in_bfloat16(engine, folders[1], 1, path)
    look("received")
    answers.append(run_engine(engine, requests))
    look("used")
    push_in_bfloat16(engine, folders[2], 2, path, only=["model.layers.1.self_attn.q_proj.weight"])
    look("interrupted")
    try:
        engine.llm.collective_rpc(multiply_once)
        refused = ""
    except TransferError as error:
        refused = str(error)
    push_in_bfloat16(engine, folders[2], 3, path)
    answers.append(run_engine(engine, requests))
    look("used again")
    return answers, seen, refused


def fresh_in_bfloat16(folder):
    return run_engine(make_engine(folder, dtype="bfloat16"), greedy())


@pytest.mark.parametrize(("kind", "num_packed"), [("tied", 9), ("untied", 9), ("moe", 5)])
def test_an_engine_packs_after_each_update_and_answers_to_the_bit(kind, num_packed, request, tmp_path):
    packed(layer(draw(64, 64, dtype=torch.bfloat16)))
    folders = request.getfixturevalue(f"{kind}_folders")
    answers, seen, refused = run_forked(updates, folders, str(tmp_path / "file"), preload="engine")
    for folder, found in zip(folders, answers, strict=False):
        assert difference(found, run_forked(fresh_in_bfloat16, folder, preload="engine")) == 0
    assert all(difference(a, b) > 0.01 for i, a in enumerate(answers) for b in answers[:i])
    expected = [
        ("loaded", "PACKED", 1, True),
        ("received", "PLAIN", 1, True),
        ("used", "PACKED", 2, True),
        ("interrupted", "TORN", 2, False),
        ("used again", "PACKED", 3, True),
    ]
    first = seen[0][1]
    for (what, forms, whole), (expected_what, form, times, expected_whole) in zip(seen, expected, strict=True):
        assert (what, whole) == (expected_what, expected_whole) and len(forms) == num_packed
        for name, (found, times_packed, in_place, where) in forms.items():
            assert (found, times_packed) == (form, times), f"{what}: {name}"
            assert in_place is (name != "lm_head") and where == first[name][3]  # nothing was allocated anew
    assert "parts of two versions" in refused

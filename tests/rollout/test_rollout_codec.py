"""Messages to frames and back: types on both sides, damage, and content made by somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.rollout import codec
from megatron_dgrpo.rollout import messages as m
from megatron_dgrpo.rollout.codec import decode, encode, register


@register
@dataclass(frozen=True)
class Inner:
    values: tuple[int, ...]


@register
@dataclass(frozen=True)
class Everything:
    text: str
    number: int
    real: float
    flag: bool
    nothing: None
    maybe: int | None
    names: list[str]
    pair: tuple[int, str]
    table: dict[str, float]
    inner: Inner
    inners: tuple[Inner, ...]
    array: np.ndarray
    arrays: tuple[np.ndarray, ...]
    mapping: Mapping[str, Inner] = field(default_factory=dict)


def everything() -> Everything:
    return Everything(
        text='ünïcode \0 "quoted"',
        number=-(2**70),
        real=0.1,
        flag=True,
        nothing=None,
        maybe=None,
        names=["a", ""],
        pair=(1, "x"),
        table={"a": 1.0, "b": float("inf")},
        inner=Inner(()),
        inners=(Inner((1,)), Inner((2, 3))),
        array=np.arange(6, dtype=">i4").reshape(2, 3).T,
        arrays=(np.zeros((0, 4), np.float32), np.array(True), np.array([1.5], np.float16)),
        mapping={"k": Inner((4,))},
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype.newbyteorder("=") == b.dtype and np.array_equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)  # type: ignore[attr-defined]
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


# ---- messages and frames ----


def test_a_message_comes_back_as_it_was():
    assert same(everything(), decode(encode(everything())))
    assert decode(encode(everything())).array.flags.writeable


def test_trajectories_are_messages():
    logprobs = np.array([-0.1, -0.2], np.float32)
    segment = Segment(np.array([5, 6], np.int32), True, logprobs, None, np.array([3, 3], np.int32))
    tool = Segment(np.array([7], np.int32), False)
    trajectory = Trajectory("p", 1, np.array([1, 2], np.int32), (segment, tool), "stop", {"exact": 1.0})
    assert same(decode(encode(trajectory)), trajectory)
    response = m.Response(1, 2**62, trajectory.segments, "stop", {"exact": 0.1 + 0.2})
    chunk = m.Chunk((m.Group("p", trajectory.prompt_tokens, (response,)),), last=True)
    assert same(decode(encode(chunk)), chunk)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"text": 1}, "Everything.text must be str, not int"),
        ({"number": True}, "Everything.number must be int, not bool"),
        ({"number": 1.0}, "Everything.number must be int, not float"),
        ({"flag": 1}, "Everything.flag must be bool"),
        ({"real": "1"}, "Everything.real must be float"),
        ({"nothing": 0}, "Everything.nothing must be"),
        ({"maybe": "x"}, "Everything.maybe must be int | None"),
        ({"names": ("a",)}, r"Everything.names must be list\[str\]"),
        ({"names": [1]}, r"Everything.names\[0\] must be str"),
        ({"pair": (1,)}, "Everything.pair must have 2 items"),
        ({"table": {1: 1.0}}, "Everything.table must be"),
        ({"inner": Inner}, "Everything.inner must be Inner"),
        ({"inners": (Inner((1.5,)),)}, r"Inner.values\[0\] must be int"),  # type: ignore[arg-type]
        ({"array": [1]}, "Everything.array must be ndarray"),
        ({"array": np.array(["x"], object)}, "array of object"),
        ({"array": np.array(["x"])}, "array of <U1"),
    ],
)
def test_a_wrong_type_is_refused_by_the_sender(change, text):
    with pytest.raises(RolloutError, match=text):
        encode(Everything(**{**everything().__dict__, **change}))


def frame(text: bytes, blobs: bytes = b"") -> bytes:
    """A frame with a right checksum around any content."""
    content = codec.HEADER.pack(b"dgM1", len(text), len(blobs)) + text + blobs
    return content + codec._mac(b"", 0, content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'["Nobody",{}]', "'Nobody' is not a known message"),
        (b'["Inner",{}]', r"missing fields \['values'\]"),
        (b'["Inner",{"values":[],"more":1}]', r"unknown fields \['more'\]"),
        (b'["Inner",{"values":["1"]}]', r"Inner.values\[0\] must be int, not str"),
        (b'["Inner",{"values":{"0":1}}]', "Inner.values must be"),
        (b'["Describe",{"call":true}]', "Describe.call must be int, not bool"),
        (b'{"Inner":1}', "its name and its fields"),
        (b"[" * 100_000, "not JSON"),
        (b'["Inner",{"values":[' + b"9" * 5000 + b"]}]", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'["Segment",{"tokens":{"dtype":"|O","shape":[1]},"trained":true}]', "Segment has missing fields"),
    ],
)
def test_a_wrong_message_is_refused_by_the_receiver(text, says):
    with pytest.raises(RolloutError, match=says):
        decode(frame(text))


@pytest.mark.parametrize(
    ("array", "blobs", "says"),
    [
        (b'{"dtype":"|O8","shape":[1]}', b"12345678", "not the description of an array"),
        (b'{"dtype":"<i4","shape":[2]}', b"1234", "longer than what came with it"),
        (b'{"dtype":"<i4","shape":[-1]}', b"", "impossible shape"),
        (b'{"dtype":"<i4","shape":[1099511627776,1099511627776]}', b"", "impossible shape"),
        (b'{"dtype":"<i4","shape":[1000000000,1000000000]}', b"", "longer than what came with it"),
        (b'{"dtype":"<i4","shape":[1],"more":1}', b"1234", "not the description"),
        (b'{"dtype":"<i4","shape":[1]}', b"12345678", "4 bytes of a frame belong to no field"),
    ],
)
def test_a_wrong_array_is_refused(array, blobs, says):
    fields = b'"trained":true,"behaviour_logprobs":null,"old_logprobs":null,"weight_versions":null'
    with pytest.raises(RolloutError, match=says):
        decode(frame(b'["Segment",{"tokens":' + array + b"," + fields + b"}]", blobs))


def test_every_truncation_and_every_flipped_bit_is_noticed():
    good = encode(m.Completed(3, m.Completion("p", 0, np.arange(4, dtype=np.int32), np.zeros(4, np.float32), "stop",
                                              np.zeros(4, np.int32), 0)), key=b"key", sequence=5)  # fmt: skip
    assert decode(good, key=b"key", sequence=5).call == 3
    for key, sequence in ((b"other", 5), (b"key", 6), (b"", 5)):
        with pytest.raises(RolloutError, match="MAC"):
            decode(good, key=key, sequence=sequence)
    for length in range(len(good)):
        with pytest.raises(RolloutError):
            decode(good[:length], key=b"key", sequence=5)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        with pytest.raises(RolloutError):
            decode(bad, key=b"key", sequence=5)
    with pytest.raises(RolloutError):
        decode(good + b"x", key=b"key", sequence=5)


def test_unregistered_and_unfrozen_classes_are_no_messages():
    @dataclass(frozen=True)
    class Stranger:
        a: int

    with pytest.raises(RolloutError, match="not a registered message"):
        encode(Stranger(1))
    with pytest.raises(AssertionError):
        register(dataclass(type("Loose", (), {"__annotations__": {"a": int}})))

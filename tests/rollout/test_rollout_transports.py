"""Which transport an engine's weights take: from facts of both sides alone, with every violation at once."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_dgrpo.rollout.transports import TRANSPORTS, Side, choose

CPU = Side("host/1", "cpu", (), "0.32.0")
GPU = Side("host/1", "cuda", ("A", "B"), "0.32.0")
SLEEPS = replace(GPU, can_sleep=True)


def chosen(wanted: str, placement: str, trainer: Side, engine: Side) -> str | None:
    choice = choose("engines.main", "the engine", wanted, placement, trainer, engine)
    assert (choice.transport is None) == bool(choice.problems)
    return choice.transport


def said(wanted: str, placement: str, trainer: Side, engine: Side) -> tuple[str, ...]:
    return choose("engines.main", "the engine", wanted, placement, trainer, engine).problems


@pytest.mark.parametrize(
    ("placement", "trainer", "engine", "transport"),
    [
        ("separate", CPU, CPU, "shared_memory"),
        ("separate", CPU, replace(CPU, shared_memory="other/1"), "wire"),
        ("separate", CPU, replace(CPU, shared_memory="host/2"), "wire"),  # a container's own /dev/shm
        ("separate", GPU, replace(GPU, gpus=("C",)), "nccl"),
        ("separate", GPU, replace(GPU, gpus=("C",), shared_memory="other/1"), "nccl"),
        ("separate", replace(GPU, vllm_version=None), replace(GPU, gpus=("C",)), "shared_memory"),
        ("separate", GPU, replace(GPU, gpus=("C",), vllm_version="0.31.0"), "shared_memory"),
        ("separate", GPU, CPU, "shared_memory"),
        ("separate", CPU, GPU, "shared_memory"),
        ("separate", GPU, replace(CPU, shared_memory="other/1"), "wire"),
        ("colocated", GPU, SLEEPS, "ipc"),
        ("colocated", GPU, replace(SLEEPS, gpus=("B",)), "ipc"),
        ("colocated", replace(GPU, expandable_segments=True), SLEEPS, "shared_memory"),
        ("colocated", GPU, replace(SLEEPS, vllm_version="0.31.0"), "shared_memory"),
        ("colocated", GPU, replace(SLEEPS, shared_memory="host/2"), "wire"),
    ],
)
def test_auto_takes_the_fastest_that_both_sides_can_do(placement, trainer, engine, transport) -> None:
    assert chosen("auto", placement, trainer, engine) == transport
    assert chosen(transport, placement, trainer, engine) == transport
    for faster in TRANSPORTS[: TRANSPORTS.index(transport)]:
        assert chosen(faster, placement, trainer, engine) is None


def test_every_violation_is_said_at_once_with_its_remedy() -> None:
    trainer, engine = replace(CPU, expandable_segments=True), replace(CPU, shared_memory="o", vllm_version="0.31.0")
    problems = said("ipc", "separate", trainer, engine)
    for words in (
        "the student's ranks run on cpu",
        "the engine runs on cpu",
        "the engine has vLLM 0.31.0, the trainer 0.32.0",
        "the engine has GPUs of its own",
        "does not see this machine's /dev/shm",
        "expandable segments",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 6 and all("transport=auto" in problem for problem in problems)


def test_a_placement_that_the_gpus_contradict() -> None:
    assert "cannot sleep" in said("auto", "colocated", CPU, CPU)[0]
    assert "no GPU to share" in said("auto", "colocated", CPU, CPU)[1]
    assert "started without sleep mode" in said("auto", "colocated", GPU, GPU)[0]
    (problem,) = said("auto", "colocated", GPU, replace(SLEEPS, gpus=("B", "C")))
    assert "is on C, where no rank of the student is (A, B)" in problem and "placement=separate" in problem
    (problem,) = said("auto", "separate", GPU, replace(GPU, gpus=("B", "C")))
    assert "is on B, where ranks of the student are, too" in problem and "placement=colocated" in problem


def test_each_transport_asked_for_where_it_cannot_be() -> None:
    away = replace(CPU, shared_memory="other/1")
    (problem,) = said("shared_memory", "separate", CPU, away)
    assert "does not see this machine's /dev/shm" in problem and "transport=wire" in problem
    (problem,) = said("nccl", "colocated", GPU, SLEEPS)
    assert "one rank on a GPU" in problem and "transport=ipc" in problem
    (problem,) = said("nccl", "separate", replace(GPU, vllm_version=None), replace(GPU, gpus=("C",)))
    assert "no vLLM" in problem
    assert said("wire", "separate", CPU, away) == said("wire", "separate", CPU, CPU) == ()


def test_what_is_not_known_before_the_ranks_are_there_is_no_violation() -> None:
    unknown = replace(GPU, platform=None, gpus=None)
    assert said("ipc", "colocated", unknown, SLEEPS) == ()
    assert said("nccl", "separate", unknown, GPU) == ()


def test_every_combination_has_a_transport_or_a_reason() -> None:
    sides = [
        Side(shm, platform, ("A",) if platform == "cuda" else (), version, expandable, sleeps)
        for shm, platform, version, expandable, sleeps in itertools.product(
            ("h", "o"), ("cpu", "cuda"), ("0.32.0", "0.31.0", None), (False, True), (False, True)
        )
    ]
    for trainer, engine, placement in itertools.product(sides, sides, ("separate", "colocated")):
        auto = chosen("auto", placement, trainer, engine)
        possible = [t for t in TRANSPORTS if chosen(t, placement, trainer, engine)]
        assert (possible[0] if possible else None) == auto

"""Runs that are killed at named points end as if they had not been: the short form here, all points in the long one.

Real runs: two ranks, an engine, a teacher, checkpoints after every step, in processes that are forked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dgrpo.points.plan import HALF, Fault
from megatron_dgrpo.points.table import POINTS
from megatron_dgrpo.testing.fault_cases import ELSEWHERE, RARE, cases
from megatron_dgrpo.testing.faults import tiny_periodic_run, tiny_run
from megatron_dgrpo.testing.one_hop_models import write_models
from megatron_dgrpo.testing.soak import Chain, Start, each_once, exact, random_moment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_models(folder, 0, num_train=128, num_heldout=16)
    return folder


@pytest.fixture(scope="module")
def synchronous(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("synchronous"), small, tiny_run, exact)
    chain.begin()
    return chain


@pytest.fixture(scope="module")
def periodic(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("periodic"), small, tiny_periodic_run, each_once)
    chain.begin()
    return chain


def _struck(start: Start) -> None:
    assert not start.problems, "\n".join(start.problems)
    assert start.struck == 1 and start.status != 0


def _ends(start: Start) -> None:
    assert not start.problems, "\n".join(start.problems)
    assert start.ended


def test_every_point_is_reached_by_a_run_that_is_killed_there(synchronous: Chain) -> None:
    reached = {point for counts in synchronous.reached.values() for point in counts}
    assert reached | RARE.keys() | ELSEWHERE.keys() == POINTS.keys()
    assert {case.fault.point for case in cases(synchronous.reached, 0)} | ELSEWHERE.keys() == POINTS.keys()
    for point, where in ELSEWHERE.items():
        assert f'"{point}"' in (ROOT / where.partition(": ")[2]).read_text()


def test_a_run_that_is_killed_at_delicate_points_ends_with_the_same_bits(synchronous: Chain) -> None:
    """One run, killed again and again: each start goes on from what the one before left."""
    for fault in (
        Fault("step.end", "kill", nth=2, role="rank0"),  # sft; the figures are there, no checkpoint of them
        Fault("tensors.data", "kill", HALF, nth=20, role="rank1"),  # inside a save
        Fault("folder.name", "kill", role="rank0"),  # before the rename
        Fault("transfer.box", "kill", nth=9, role="rank1"),  # in the middle of a bucket
        Fault("journal.record", "kill", HALF, nth=3, role="rank0"),  # dgrpo; a record is torn
        Fault("step.update", "kill", nth=3, role="rank0"),  # between an update and the journal
        Fault("step.journal", "kill", role="rank0"),  # between the journal and the figures, two updates to a batch
        Fault("prune.tree", "kill", HALF, role="rank0"),
    ):
        _struck(synchronous.start((fault,)))
    _ends(synchronous.start())


def test_what_a_kill_leaves_of_checkpoints_goes_also_where_none_is_saved_any_more(synchronous: Chain) -> None:
    last = synchronous.reached["rank0"]["prune.tree"]
    _struck(synchronous.start((Fault("prune.tree", "kill", HALF, nth=last, role="rank0"),)))
    _ends(synchronous.start())


def test_with_the_periodic_schedule_no_trajectory_is_lost_or_trained_on_twice(periodic: Chain) -> None:
    for fault in (
        Fault("step.part", "kill", nth=3, role="rank1"),  # some chunks are in the gradients
        Fault("journal.record", "kill", HALF, nth=9, role="rank0"),
        Fault("step.update", "kill", role="rank0"),
        Fault("metrics.line", "kill", HALF, role="rank0"),
    ):
        _struck(periodic.start((fault,)))
    _ends(periodic.start())


@pytest.mark.long
@pytest.mark.parametrize("point", sorted(POINTS.keys() - ELSEWHERE.keys()))
def test_each_point(point: str, synchronous: Chain) -> None:
    """In each role and at each moment: `half` way through what is written, before and after a rename."""
    for case in cases(synchronous.reached, 1):
        if case.fault.point == point:
            starts = synchronous.strike(case)
            assert not (problems := [words for start in starts for words in start.problems]), (case.name, problems)
            assert starts[-1].struck, f"{case.name} was never reached"


@pytest.mark.long
def test_after_all_of_them_the_run_ends(synchronous: Chain) -> None:
    _ends(synchronous.start())


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["synchronous", "periodic"])
def test_random_moments(schedule: str, request: pytest.FixtureRequest) -> None:
    chain: Chain = request.getfixturevalue(schedule)
    seconds = chain.begin()
    for number in range(8):
        start = chain.kill_at(*random_moment(7, number, chain.seconds_left(seconds)))
        assert not start.problems, "\n".join(start.problems)
    _ends(chain.start())


@pytest.mark.long
def test_the_soak_can_be_killed_and_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools/soak.py"),
        "--quick",
        "--random",
        "1",
        "--folder",
        str(tmp_path / "soak"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / "soak/state.json", time.monotonic() + 300
    while not state.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = json.loads(state.read_text())["done"]["synchronous"]
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"goes on after {len(before)} kills" in second.stdout
    figures = json.loads(second.stdout.splitlines()[-1])
    assert figures["ok"] and figures["mismatches"] == 0 and figures["kills"] > len(before)
    after = json.loads(state.read_text())["done"]["synchronous"]
    assert all(after[name] == starts for name, starts in before.items()), "what was done is not done again"

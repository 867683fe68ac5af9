"""Ranks start in milliseconds, return what they computed, and fail readably."""

import os
import pickle
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_dgrpo.testing import RankError, run_distributed, run_forked
from megatron_dgrpo.testing.distributed import session_nursery
from megatron_dgrpo.testing.rank import dumps

# ---- what the ranks run ----


def compute(rank, world_size, table, scale):
    assert dist.get_rank() == rank and dist.get_world_size() == world_size == int(os.environ["WORLD_SIZE"])
    x = table[rank] * scale
    dist.all_reduce(x)
    return {"sum": x, "rank": rank, "env": os.environ["LOCAL_RANK"], "threads": torch.get_num_threads()}


def pairs(rank, world_size):
    groups = [dist.new_group([r, r + 1]) for r in range(0, world_size, 2)]
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=groups[rank // 2])
    return x.item()


def uneven(rank, world_size):
    """Rank 0 has nothing left to do while the others still need the store that it hosts."""
    if rank > 0:
        time.sleep(0.3)
        group = dist.new_group(range(1, world_size), use_local_synchronization=True)
        dist.barrier(group)
    return rank


def two_fail(rank, world_size):
    if rank == 2:
        time.sleep(0.2)
        raise KeyError("second")
    if rank == 1:
        raise ValueError("first")
    time.sleep(60)


def killed(rank, world_size):
    print(f"last words of {rank}", flush=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stuck(rank, world_size):
    if rank == 1:
        time.sleep(60)  # the others wait for it
    dist.barrier()


def meets_no_one(rank, world_size):
    return os.environ.get("MEETING"), sorted(m for m in ("megatron.core", "vllm") if m in sys.modules)


def alone(x):
    assert not dist.is_initialized()
    return x * 2, os.getppid()


def pickled():
    return pickle.dumps(torch.arange(3)), dumps(torch.arange(3))


def exits(rank, world_size):
    sys.exit("not a test")


# ---- the tests ----


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_results_come_back_by_rank(world_size):
    table = torch.arange(world_size * 3, dtype=torch.bfloat16).view(world_size, 3)
    results = run_distributed(compute, world_size, table, 2.0)
    for rank, result in enumerate(results):
        assert torch.equal(result["sum"], table.sum(0) * 2) and result["sum"].dtype == torch.bfloat16
        assert (result["rank"], result["env"], result["threads"]) == (rank, str(rank), 1)


def test_eight_ranks_start_at_once():
    session_nursery().wait_ready()
    start = time.monotonic()
    assert run_distributed(pairs, 8) == [1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 13.0, 13.0]
    assert time.monotonic() - start < 30  # 0.3 s on two idle cores


def test_rank_0_outlasts_those_who_need_its_store():
    assert run_distributed(uneven, 3) == [0, 1, 2]


def test_every_failing_rank_is_shown_the_first_first_and_the_rest_is_ended():
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_distributed(two_fail, 4)
    assert time.monotonic() - start < 40
    message = str(caught.value)
    assert message.startswith("2 of 4 ranks failed; rank0, rank3 still ran and had to be ended.")
    first, second, hung = (
        message.index(s) for s in ("rank1 raised ValueError", "rank2 raised KeyError", "rank0 was here")
    )
    assert first < second < hung
    assert 'raise ValueError("first")' in message and "in two_fail" in message


def test_a_rank_that_dies_is_named_before_those_that_noticed():
    with pytest.raises(RankError) as caught:
        run_distributed(killed, 2)
    message = str(caught.value)
    died, noticed = message.index("rank1 was killed by SIGKILL (Killed)"), message.index("rank0 raised RuntimeError")
    assert died < message.index("last words of 1") < noticed


def test_a_hang_shows_where_every_rank_is():
    with pytest.raises(RankError) as caught:
        run_distributed(stuck, 3, timeout_s=1.5)
    message = str(caught.value)
    assert message.startswith("No end within 1.5 s; rank0, rank1, rank2 still ran")
    assert "in barrier" in message and message.count(" in stuck") == 3


def test_an_exit_is_a_failure():
    with pytest.raises(RankError, match="rank0 raised SystemExit"):
        run_distributed(exits, 1)


def test_environment_and_imports():
    assert run_distributed(meets_no_one, 2, env={"MEETING": "now"}) == [("now", ["megatron.core"])] * 2
    assert "MEETING" not in os.environ


def test_a_process_of_its_own():
    doubled, parent = run_forked(alone, torch.ones(2))
    assert torch.equal(doubled, torch.full((2,), 2.0)) and parent == session_nursery().server.pid


def test_a_tensor_from_a_rank_brings_no_megatron_along():
    """Megatron-Core pickles storages by a function of its own, and unpickling would import it here."""
    plain, ours = run_forked(pickled)
    assert b"megatron.core" in plain, "Megatron-Core pickles as torch does: the way of our own can go"
    assert b"megatron.core" not in ours and torch.equal(pickle.loads(ours), torch.arange(3))


def test_what_a_rank_cannot_find_is_refused():
    with pytest.raises(RankError, match="not a function of a module's top level"):
        run_distributed(lambda rank, world_size: None, 1)


def test_what_ranks_print_is_part_of_the_output(capsys):
    run_distributed(prints, 2)
    assert capsys.readouterr().out == "[rank0]\nfrom 0\n[rank1]\nfrom 1\n"


def prints(rank, world_size):
    print("from", rank)

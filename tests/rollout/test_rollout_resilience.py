"""Real engine hosts under a real supervisor: killed and stopped in the middle of a batch, they come back, get the
current weights, and nothing is lost or counted twice. A process that plays rank 0 does what rank 0 does."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_support import CONTEXT, VOCAB, by_sample, difference, manifest_of, whole_tensors

from megatron_dgrpo.errors import LaunchError
from megatron_dgrpo.launch.engines import host_names
from megatron_dgrpo.launch.nursery import ENGINE_PRELOAD
from megatron_dgrpo.launch.supervisor import Supervisor
from megatron_dgrpo.rollout.compatibility import Expected, architecture, this_side, vllm_version
from megatron_dgrpo.rollout.control import Control
from megatron_dgrpo.rollout.messages import GenerateRequest, sample_seed
from megatron_dgrpo.rollout.pool import Pool, Replica

VERSION = 7
HANG_S = 2.0


# ---- what plays rank 0 ----


def requests(count: int = 6, samples: int = 4) -> list[GenerateRequest]:
    """Sampled ones of uneven lengths, long enough to be caught in the middle."""
    rng = np.random.default_rng(5)
    return [
        GenerateRequest(
            f"p{i}",
            rng.integers(0, VOCAB, 20 + 30 * i).astype(np.int32),
            tuple(sample_seed(0, 1, f"p{i}", s) for s in range(samples)),
            40 + 50 * i,
            1.0,
            (),
        )
        for i in range(count)
    ]


class Trainer:
    """A pool, and the weights of another folder than the one that the engines load."""

    def __init__(self, names: list[str], addresses: list[str], key: str, control: str, folders: list[str]) -> None:
        from torch.distributed import HashStore

        self.notes: list[str] = []
        self.pushes: list[list[str]] = []
        self.store, self.folder = HashStore(), folders[1]
        self.pool = Pool(
            "student",
            [Replica(n, a, key, Control(control, key)) for n, a in zip(names, addresses, strict=True)],
            Expected(
                "engines.student",
                architecture(folders[0]),
                VOCAB,
                CONTEXT,
                "float32",
                vllm_version(),
                this_side("cpu", ()),
            ),
            start_timeout_s=240,
            hang_timeout_s=HANG_S,
            restore=lambda: self.push(everywhere=False),
            note=self.notes.append,
        )

    def push(self, everywhere: bool = True) -> None:
        from megatron_dgrpo.checkpoint.hf.shards import WeightShard
        from megatron_dgrpo.rollout.transfer import push_weights

        tensors = whole_tensors(self.folder)
        targets = self.pool.targets(everywhere=everywhere)
        push_weights(
            [WeightShard(n, tuple(t.shape), t.dtype, tuple((0, k) for k in t.shape), t) for n, t in tensors.items()],
            manifest_of(tensors),
            version=VERSION,
            store=self.store,
            rank=0,
            num_ranks=1,
            clients=[replica.client for replica in targets if replica.client],
            bucket_bytes=40_000,
            shm_prefix="dgrpo-push-",
            deadline_s=60,
        )
        self.pool.given(targets)
        self.pushes.append([replica.name for replica in targets])

    def batch(self, after: int = -1, act: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """Every completion of a batch; `act` is called once when so many have come."""
        found, first = [], len(self.notes)
        batch = self.pool.generate(requests(), deadline_s=60)
        for completion in batch:
            found.append(completion)
            if len(found) == after:
                assert batch.num_missing > 5, "the batch was over before it was disturbed"
                act()
        counts = Counter((c.prompt_id, c.sample) for c in found)
        assert set(counts.values()) == {1} and len(counts) == 24, counts
        assert {int(v) for c in found for v in c.weight_versions} == {VERSION}
        return {"answers": by_sample(found), "notes": self.notes[first:]}

    def pids(self) -> list[int]:
        return [replica.info.pid for replica in self.pool.replicas if replica.info]


def signal_all(trainer: Trainer, number: int) -> Callable[[], None]:
    return lambda: [os.kill(pid, number) for pid in trainer.pids()] and None


def one_replica(folder: str, **places: Any) -> None:
    trainer = Trainer(**places)
    trainer.push()
    calm = trainer.batch()
    (before,) = trainer.pids()
    killed = trainer.batch(4, signal_all(trainer, signal.SIGKILL))
    (after,) = trainer.pids()
    assert after != before and trainer.pushes == [["engine-student"]] * 2, trainer.pushes
    assert "is lost in the middle of a batch" in killed["notes"][0] and "closed the connection" in killed["notes"][0]
    assert difference(calm["answers"], killed["answers"]) <= 1e-4
    stopped = trainer.batch(4, signal_all(trainer, signal.SIGSTOP))
    assert f"has not answered for {HANG_S:g} s: it hangs" in stopped["notes"][0]
    assert difference(calm["answers"], stopped["answers"]) <= 1e-4
    assert trainer.pids() != [after] and len(trainer.pushes) == 3
    os.kill(trainer.pids()[0], signal.SIGKILL)  # between batches: the next sync finds it
    trainer.push()
    assert difference(calm["answers"], trainer.batch()["answers"]) <= 1e-4
    pids = [before, after, *trainer.pids()]
    trainer.push()
    calm, trainer.pool.whole_again = trainer.batch(), True
    whole = trainer.batch(4, signal_all(trainer, signal.SIGKILL))
    assert "24 samples are asked again" in whole["notes"][0]
    assert difference(calm["answers"], whole["answers"]) == 0, "the same batch on the same weights: the same bits"
    Path(folder, "done").write_text(json.dumps(pids))


def two_replicas(folder: str, **places: Any) -> None:
    trainer = Trainer(**places)
    trainer.push()
    calm = trainer.batch()
    first, second = trainer.pids()
    batch = trainer.pool.generate(requests(), deadline_s=60)
    shares = [sorted(part.asked) for part in batch._parts]
    assert len(shares) == 2 and sorted(shares[0] + shares[1]) == [f"p{i}" for i in range(6)], shares
    assert all(shares), "a replica has nothing to do"
    list(batch)
    killed = trainer.batch(4, lambda: os.kill(first, signal.SIGKILL))
    assert difference(calm["answers"], killed["answers"]) <= 1e-4
    assert len(trainer.pushes) == 1, "the other one goes on alone"
    stopped_too = trainer.batch(4, lambda: os.kill(second, signal.SIGSTOP))  # now nobody is left: wait for one
    assert difference(calm["answers"], stopped_too["answers"]) <= 1e-4
    assert len(trainer.pushes) == 2 and set(trainer.pids()).isdisjoint({first, second})
    trainer.push()
    assert trainer.pushes[-1] == ["engine-student-0", "engine-student-1"]
    assert difference(calm["answers"], trainer.batch()["answers"]) <= 1e-4
    Path(folder, "done").write_text("{}")


def kill_for_ever(folder: str, **places: Any) -> None:
    trainer = Trainer(**places)
    trainer.push()
    for _ in range(5):
        trainer.batch(2, signal_all(trainer, signal.SIGKILL))
    raise AssertionError("the run should have been over")


# ---- the supervisor ----


def supervise(
    folder: Path,
    folders: list[str],
    plays: str,
    *,
    replicas: int = 1,
    max_restarts: int = 3,
    kv_cache_bytes: int = 2**26,
    tp: int = 1,
    module: str = "test_rollout_resilience",
) -> None:
    """Run it to its end."""
    with Supervisor(folder, preload={"trainer": (), "engine": ENGINE_PRELOAD}) as run:
        run.prepare("engine")
        names = host_names("student", replicas)
        sockets = [run.private_dir / f"{name}.sock" for name in names]
        args = dict(folder=str(folder), names=names, key=run.key, control=run.listen(), folders=folders)
        args["addresses"] = [f"unix:{path}" for path in sockets]
        run.start_ranks(f"{module}:{plays}", args, world_size=1)
        for name, path in zip(names, sockets, strict=True):
            its = dict(address=f"unix:{path}", key=run.key, model_path=folders[0], dtype="float32", threads=1)
            its |= dict(tp=tp, max_model_len=CONTEXT, kv_cache_bytes=kv_cache_bytes, max_num_seqs=32, prefix_cache=True)
            run.start_engine(name, "megatron_dgrpo.rollout.host:serve", its, socket=path, max_restarts=max_restarts)
        run.watch()


@pytest.mark.long
def test_an_engine_that_is_killed_or_hangs_in_a_batch_comes_back_with_the_current_weights(
    untied_folders, tmp_path, capsys
):
    supervise(tmp_path, untied_folders, "one_replica", max_restarts=4)
    pids = json.loads((tmp_path / "done").read_text())
    said = capsys.readouterr().out
    assert said.count("was killed by SIGKILL (Killed); it is started again") == 4, said
    assert "is ended: engine-student has not answered for 2 s: it hangs" in said
    assert len(set(pids)) == 3
    assert not list(Path("/dev/shm").glob("dgrpo-push-*"))


def test_two_replicas_share_the_prompts_and_take_over_from_each_other(untied_folders, tmp_path):
    supervise(tmp_path, untied_folders, "two_replicas", replicas=2)
    assert (tmp_path / "done").exists()


def test_an_engine_that_ends_too_often_ends_the_run(untied_folders, tmp_path):
    with pytest.raises(LaunchError) as caught:
        supervise(tmp_path, untied_folders, "kill_for_ever", max_restarts=1)
    said = str(caught.value)
    assert "engine-student (engine host, pid" in said and "was killed by SIGKILL" in said
    assert "It had been started again 1 times within an hour (max_restarts=1)" in said
    assert f"Its last words ({tmp_path}/logs/engine-student.log)" in said


def test_an_engine_that_never_served_is_not_started_again(untied_folders, tmp_path):
    """No room for the keys and values of one sequence: vLLM's own words are in the error."""
    said = r"(?s)exited with status 1.*had not served yet.*RolloutError: vLLM.*raise kv_cache_bytes"
    with pytest.raises(LaunchError, match=said):
        supervise(tmp_path, untied_folders, "one_replica", kv_cache_bytes=2**14)

"""An engine that dies while weights are being pushed to it from two ranks: the push is made again when it is back."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from test_loop import _config, _write

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.testing.distributed import run_distributed, session_nursery


def push(rank: int, world_size: int, config_path: str, dies: bool) -> dict[str, Any]:
    """What a rank does, up to the first rollout. The host is killed when the third bucket is announced to it."""
    import torch.distributed as dist

    from megatron_dgrpo.data.tokenizer import Tokenizer
    from megatron_dgrpo.errors import TransferError
    from megatron_dgrpo.parallel.groups import Groups
    from megatron_dgrpo.rollout.client import EngineClient
    from megatron_dgrpo.train.engines import Engines
    from megatron_dgrpo.train.options import load_run_student
    from megatron_dgrpo.train.run import Run

    config = load(config_path)
    groups = Groups(tp=2, dp=1)
    run = Run(
        config=config,
        groups=groups,
        student=load_run_student(config, groups),
        tokenizer=Tokenizer.load(config.models["student"].path),
        store=dist.distributed_c10d._get_default_store(),
        engines=Engines(config, {}, "", "") if rank == 0 else None,
        records=None,
        journal=None,
        shm_prefix="dgrpo-push-",
    )
    run.version, buckets = 5, 0
    load_bucket = EngineClient.load_bucket

    def disturbed(client: EngineClient, *args: Any, **kwargs: Any) -> int:
        nonlocal buckets
        buckets += 1
        if buckets == 3:
            if dies:
                os.kill(client.describe().pid, signal.SIGKILL)
            else:
                raise TransferError("no bucket today")
        return load_bucket(client, *args, **kwargs)

    EngineClient.load_bucket = disturbed  # type: ignore[method-assign]
    try:
        run.sync("rollout")
    except TransferError as error:
        return {"error": str(error)}
    finally:
        EngineClient.load_bucket = load_bucket  # type: ignore[method-assign]
    found = {"version": run.versions["rollout"], "buckets": buckets}
    if run.engines:
        (replica,) = run.engines.client("rollout").replicas
        assert replica.serves and replica.client
        info = replica.client.describe()
        found |= {"engine": info.weight_version, "whole": info.whole}
    dist.barrier()
    return found


@pytest.mark.long
def test_a_push_is_made_again_when_the_engine_is_back_and_only_then(files: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
    key_file = tmp_path / "key"
    key_file.write_text(secrets.token_hex(32))
    key_file.chmod(0o600)
    config = _config(files, tmp_path / "run")
    config["engines"]["rollout"] |= {"addresses": [address], "key_file": str(key_file), "bucket_bytes": 2**12}
    config["engines"]["rollout"] |= {"start_timeout_s": 60, "hang_timeout_s": 20, "request_timeout_s": 60}
    path = str(_write(tmp_path, config))
    server = session_nursery("engine")
    args = dict(address=address, key=key_file.read_text(), model_path=str(files / "student"), dtype="float32")
    args |= dict(max_model_len=32, kv_cache_bytes=2**26, max_num_seqs=8, prefix_cache=True, threads=1)  # type: ignore[arg-type]

    def start() -> Any:
        return server.start("engine", "megatron_dgrpo.rollout.host:serve", args, log_path=tmp_path / "log")

    server.wait_ready()
    hosts, over = [start()], threading.Event()

    def keep() -> None:
        while not over.wait(0.1):
            if hosts[-1].poll() is not None:
                hosts.append(start())

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        first, other = run_distributed(push, 2, path, True)
        assert first["version"] == other["version"] == first["engine"] == 5 and first["whole"]
        assert first["buckets"] > 6, "the second push was of all buckets"
        assert len(hosts) >= 2
        refused = run_distributed(push, 2, path, False)
        assert all("no bucket today" in result["error"] for result in refused), "a push that fails otherwise is not"
    finally:
        over.set()
        keeper.join()
        hosts[-1].kill()
        hosts[-1].wait(60)
    assert not list(Path("/dev/shm").glob("dgrpo-push-*"))

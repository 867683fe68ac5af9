"""An engine host: one process around one vLLM engine, spoken to over a socket.

One thread does everything, in turns: take in messages, take one step of the engine, send what ended. So a weight update
never meets a step half done, and any question is answered within one step. The host listens only once the model is
loaded and has generated: who can connect can be served.

What it promises: a request is served whole or answered with a failure; nothing is generated from weights that are not
all of one version; a client that goes takes its unfinished samples and its half-done update with it; with its last
owner the host ends.

A deterministic engine serves one call at a time, whole, from its first step: the others wait for their turn.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from megatron_dgrpo.errors import RolloutError, TransferError, listing
from megatron_dgrpo.rollout import messages as m
from megatron_dgrpo.rollout.server import Peer, Server
from megatron_dgrpo.rollout.vllm_plugin import HOST_ENV
from megatron_dgrpo.rollout.wire import parse_address

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process; so does its model, at tp=1
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default asserts where there is one NUMA node
    "VLLM_CPU_CI_ENV": "1",  # no warm-up of vLLM's own
    "VLLM_NO_USAGE_STATS": "1",
    HOST_ENV: "1",
}


def serve(
    *,
    address: str,
    key: str,
    model_path: str,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int,
    max_num_seqs: int,
    prefix_cache: bool,
    threads: int,
    tp: int = 1,
    chunked_prefill: int | None = None,
    deterministic: bool = False,
    sleeps: bool = False,
    hf_overrides: dict[str, Any] | None = None,
    quantization: str | None = None,
) -> None:
    """Load a model, listen, serve until the last owner has gone."""
    os.environ.update(_ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    family, path = parse_address(address)
    if family == socket.AF_UNIX:
        tempfile.tempdir = os.path.dirname(path)  # what vLLM leaves behind lies in the run's folder and goes with it
    from megatron_dgrpo.rollout.engine import Engine  # imports vLLM, which reads the environment

    try:
        engine = Engine(
            model_path=model_path,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_cache_bytes=kv_cache_bytes,
            max_num_seqs=max_num_seqs,
            prefix_cache=prefix_cache,
            threads=threads,
            tp=tp,
            chunked_prefill=chunked_prefill,
            deterministic=deterministic,
            sleeps=sleeps,
            hf_overrides=hf_overrides,
            quantization=quantization,
        )
    except ValueError as error:  # vLLM's way to refuse settings
        raise RolloutError(
            f"vLLM cannot serve {model_path} with max_model_len={max_model_len}, kv_cache_bytes={kv_cache_bytes}, "
            f"max_num_seqs={max_num_seqs}, dtype={dtype}; if it lacks room, raise kv_cache_bytes or lower "
            f"max_model_len. In its words: {error}"
        ) from error
    if sleeps:
        engine.sleep()  # until it is first given weights, the GPU is the student's
    server = Server(address, key)
    try:
        Host(engine, server).run()
    finally:
        server.close()


@dataclass(frozen=True)
class _Sample:
    peer: Peer
    call: int


class Host:
    """The loop between an engine and its clients."""

    def __init__(self, engine: Any, server: Server) -> None:
        self.engine = engine
        self.server = server
        self._samples: dict[str, _Sample] = {}
        self._waiting: list[tuple[Peer, m.Generate]] = []
        self._count = 0
        self._updater: Peer | None = None
        self._owners: list[Peer] = []
        self._done = False

    def run(self) -> None:
        while not self._done:
            for peer, message in self.server.poll(0.0 if self._samples or self._waiting else None):
                if message is None:
                    self._forget(peer)
                else:
                    self._handle(peer, message)
            if self._waiting and not self._samples:
                self._generate(*self._waiting.pop(0))
            if self._samples:
                self._step()
        self.server.flush(5.0)

    # ---- one step ----

    def _step(self) -> None:
        try:
            ended = self.engine.step()
        except Exception as error:  # the engine's state is unknown now: tell everybody who waits, and end
            for peer, call in {(s.peer, s.call) for s in self._samples.values()}:
                self._fail(peer, call, "engine", f"the engine broke while generating: {type(error).__name__}: {error}")
            self.server.flush(5.0)
            raise
        for sample_id, completion in ended:
            sample = self._samples.pop(sample_id)
            self.server.send(sample.peer, m.Completed(sample.call, completion))

    # ---- messages ----

    def _handle(self, peer: Peer, message: Any) -> None:
        if not peer.attached and not isinstance(message, m.Attach):
            self.server.drop(peer, f"sent a {type(message).__name__} before it attached")
            return
        match message:
            case m.Attach():
                peer.attached, peer.owner = True, message.owner
                if message.owner:
                    self._owners.append(peer)
                self.server.send(peer, m.Described(message.call, self.engine.info()))
            case m.Describe():
                self.server.send(peer, m.Described(message.call, self.engine.info()))
            case m.Generate():
                self._generate(peer, message)
            case m.Cancel():
                self._waiting = [(p, g) for p, g in self._waiting if p is not peer or g.call != message.call]
                self._abort([i for i, s in self._samples.items() if s.peer is peer and s.call == message.call])
            case (
                m.BeginUpdate() | m.JoinUpdate() | m.WeightBytes() | m.LoadBucket() | m.FinishUpdate()
                | m.AbandonUpdate() | m.Sleep() | m.Wake()
            ):  # fmt: skip
                self._update(peer, message)
            case m.Shutdown():
                self._done = True
                self.server.send(peer, m.Done(message.call))
            case _:
                self.server.drop(peer, f"sent a {type(message).__name__}, which is not a client's to send")

    def _fail(self, peer: Peer, call: int, kind: str, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk ends no engine
            print(f"{peer.name} got a failure ({kind}): {text}", file=sys.stderr, flush=True)
        self.server.send(peer, m.Failure(call, kind, text))

    def _generate(self, peer: Peer, message: m.Generate) -> None:
        if self.engine.deterministic and self._samples:
            self._waiting.append((peer, message))
            return
        if not self.engine.whole:
            text = (
                f"the engine's weights are not whole: an update after version {self.engine.weight_version} is half "
                "done or has failed; finish an update first"
            )
            self._fail(peer, message.call, "not_whole", text)
            return
        problems = [f"prompt {r.prompt_id!r}: {p}" for r in message.requests for p in self.engine.problems(r)]
        if problems:
            self._fail(peer, message.call, "request", listing("Nothing was generated, because of", problems))
            return
        added = []
        try:
            self.engine.start_batch()
            for request in message.requests:
                for sample in range(len(request.seeds)):
                    self._count += 1
                    self.engine.add(str(self._count), request, sample)
                    added.append(str(self._count))
        except Exception as error:  # vLLM's own validation, in whatever form; the engine is as it was
            self.engine.abort(added)
            self._fail(peer, message.call, "request", f"prompt {request.prompt_id!r}: {error}")
            return
        self._samples.update(dict.fromkeys(added, _Sample(peer, message.call)))

    def _abort(self, sample_ids: list[str]) -> None:
        self.engine.abort(sample_ids)
        for sample_id in sample_ids:
            del self._samples[sample_id]

    def _update(self, peer: Peer, message: Any) -> None:
        if self._updater not in (None, peer):
            self._fail(peer, message.call, "busy", f"{self._updater.name} is updating the weights")  # type: ignore[union-attr]
            return
        self._updater = peer
        try:
            match message:
                case m.BeginUpdate():
                    self.engine.begin_update(message)
                case m.JoinUpdate():
                    self.engine.join_update(message)
                case m.WeightBytes():
                    self.engine.take_bytes(message)
                    return
                case m.LoadBucket():
                    self.engine.load_bucket(message)
                case m.FinishUpdate():
                    self.engine.finish_update(message.version)
                case m.AbandonUpdate():
                    self.engine.abandon_update()
                case m.Sleep():
                    self.engine.sleep()
                case m.Wake():
                    self.engine.wake(message.what)
        except Exception as error:  # of whatever kind: the engine stays, and refuses to generate until it is whole
            known = isinstance(error, TransferError | RolloutError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            self._fail(peer, message.call, "busy" if isinstance(error, RolloutError) else "transfer", text)
            self._updater = None
            return
        if isinstance(message, m.FinishUpdate | m.AbandonUpdate | m.Sleep | m.Wake):
            self._updater = None
        self.server.send(peer, m.Done(message.call))

    def _forget(self, peer: Peer) -> None:
        self._waiting = [(p, g) for p, g in self._waiting if p is not peer]
        self._abort([i for i, s in self._samples.items() if s.peer is peer])
        if self._updater is peer:
            self._updater = None
            self.engine.abandon_update()
        if peer.owner:
            self._owners.remove(peer)
            self._done = not self._owners

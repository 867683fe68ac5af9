"""A process that scores. It reads tasks from a socket and answers sample by sample; it imports no torch.

A line of JSON is a message. A task names a reward's settings and samples; the answers are `ready`, then for each sample
`begin` and `value` or `failed`, and `done` at the end. `broken` says that the reward cannot be made at all. A task
without samples asks whether it can be. Nothing is unpickled: a user's function gives a number, and only a number goes
back.

The worker limits its own time with a timer that raises (`_Overtime`, which `except Exception` does not catch). Its
owner kills it a little later where that does not help: in native code, or in a function that catches everything.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron_dgrpo.errors import DGRPOError
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.kinds import build, read_settings

_PR_SET_PDEATHSIG = 1
_KEPT = 64
"""Rewards that a worker keeps ready; a run has fewer."""


class _Overtime(BaseException):
    pass


def main(descriptor: int, owner: int) -> None:
    """Target of the pool. `owner` is its process: the worker ends with it, in whatever way it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != owner:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the owner's to deal with
    signal.signal(signal.SIGALRM, _raise_overtime)
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)  # not a program's that a user's function starts
    scorers: dict[str, Any] = {}

    def send(**message: Any) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    status = 1
    try:
        with channel.makefile("rb") as tasks:
            for line in tasks:
                _work(json.loads(line), scorers, send)
        status = 0
    except BaseException as error:
        _log(error)
    finally:
        os._exit(status)  # threads that a user's function left behind do not hold it


def _raise_overtime(number: int, frame: Any) -> None:
    raise _Overtime


def _work(task: dict[str, Any], scorers: dict[str, Any], send: Any) -> None:
    text = task["reward"]
    try:
        if text not in scorers:
            if len(scorers) >= _KEPT:
                scorers.clear()
            scorers[text] = build(read_settings(text))
        if not task["samples"] and hasattr(scorers[text], "problem"):
            scorers[text].problem()
    except Exception as error:
        _log(error)
        send(broken=_why(error))
        return
    send(ready=True)
    scorer, rows = scorers[text], task["rows"]
    samples = [Sample(text=response, **rows[row]) for row, response in task["samples"]]
    if hasattr(scorer, "score_all"):
        scorer.score_all(samples, lambda index, value: _answer(send, index, value))
    else:
        for index, sample in enumerate(samples):
            send(begin=index)
            _answer(send, index, _score(scorer, sample, task["limit_s"]))
    send(done=True)


def _answer(send: Any, index: int, value: Any) -> None:
    if isinstance(value, Failure):
        send(index=index, failed=value.why)
    else:
        send(index=index, value=value)


def _score(scorer: Any, sample: Sample, limit_s: float) -> float | Failure:
    try:
        with _limited(limit_s):
            value = scorer.score(sample)
    except _Overtime:
        return Failure(f"it took more than {limit_s:g} s")
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        _log(error)
        return Failure(_why(error))
    number = as_number(value)
    return Failure(f"it gave {value!r:.80}, which is no finite number") if number is None else number


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, _raise_overtime)  # a user's function may have used it


def as_number(value: Any) -> float | None:
    """The value as a finite float; None for what is not one. Text is not, even if it could be read as one."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value)
    except Exception:  # of a class that a user's function made up
        return None
    return number if math.isfinite(number) else None


def _why(error: BaseException) -> str:
    return (str(error) if isinstance(error, DGRPOError) else repr(error))[:500]


def _log(error: BaseException) -> None:
    if not isinstance(error, DGRPOError):
        with suppress(OSError, ValueError):  # a user's function may have closed it
            traceback.print_exception(error)
            sys.stderr.flush()

"""A language model behind an OpenAI-compatible address as a judge, asked with the standard library's HTTP.

One answer is a chat completion; its text is looked at, nothing else. What can pass (no connection, 429, 5xx) is tried
again with waits that double, as long as the response's whole time allows; what cannot (no such model, a wrong key)
fails at once, with the server's words. Nothing that goes wrong is a score.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from threading import Lock
from typing import Any

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Failure, Report, Sample

_PASSING = (408, 409, 425, 429)
_FIRST_WAIT_S = 0.5
_MAX_REPLY_BYTES = 2**20
_KEPT = 100_000


class _MayPass(Exception):
    """What went wrong may not the next time. `wait_s`: what the server asked for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Judge:
    def __init__(self, config: settings.Judge) -> None:
        self._config = config
        self._pattern = re.compile(config.pattern)
        self._opener = urllib.request.build_opener(_StaysHere)
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_variable:
            key = os.environ.get(config.api_key_variable, "").strip()
            if not key:
                raise RewardError(f"the judge's key is looked for in {config.api_key_variable}, which is not set")
            self._headers["Authorization"] = f"Bearer {key}"
        self._cache = Cache(config.cache_file)

    def score_all(self, samples: Sequence[Sample], report: Report) -> None:
        """Equal questions are asked once."""
        places: dict[str, list[int]] = {}
        bodies: dict[str, bytes] = {}
        for index, sample in enumerate(samples):
            try:
                body = self._body(sample)
            except Exception as error:  # of the template's formatting
                report(index, Failure(f"the template can't be filled in: {error!r:.200}"))
                continue
            key = sha256(body + f"\n{self._config.url} {self._config.pattern}".encode()).hexdigest()
            places.setdefault(key, []).append(index)
            bodies[key] = body
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            for key, answer in zip(bodies, threads.map(self._answer, bodies, bodies.values()), strict=True):
                for index in places[key]:
                    report(index, answer)

    def problem(self) -> None:
        """RewardError if it can't be reached, or does not have the model; for before a run."""
        try:
            listed = json.loads(self._open("models", None, time.monotonic() + min(10.0, self._config.timeout_s)))
            names = [str(entry["id"]) for entry in listed["data"]]
        except _MayPass as error:
            raise RewardError(
                f"the judge at {self._config.url} does not answer ({error}): start it, or correct url"
            ) from None
        except (ValueError, LookupError, TypeError):
            return  # not every server lists its models
        if names and self._config.model not in names:
            raise RewardError(
                f"the judge at {self._config.url} has no model {self._config.model!r}; it has {', '.join(names)}"
            )

    # ---- one answer ----

    def _body(self, sample: Sample) -> bytes:
        content = self._config.template.format(
            prompt=sample.prompt,
            response=sample.text[-self._config.max_response_chars :],
            answer=sample.answer,
            fields=sample.fields,
        )
        request = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
        }
        return json.dumps(request).encode()

    def _answer(self, key: str, body: bytes) -> float | Failure:
        known = self._cache.get(key)
        if known is not None:
            return self._scaled(known)
        deadline, wait_s = time.monotonic() + self._config.timeout_s, _FIRST_WAIT_S
        for attempt in range(self._config.retries + 1):
            try:
                raw = self._read_score(self._open("chat/completions", body, deadline))
            except RewardError as error:
                return Failure(str(error))
            except _MayPass as error:
                pause = max(error.wait_s, wait_s * random.uniform(0.5, 1.0))
                times = f"asked {attempt + 1} times" if attempt else "asked once"
                failure = Failure(f"the judge at {self._config.url} gave no score ({times}): {error}")
                if attempt == self._config.retries or time.monotonic() + pause >= deadline:
                    return failure
                time.sleep(pause)
                wait_s *= 2
            else:
                self._cache.put(key, raw)
                return self._scaled(raw)
        return failure

    def _scaled(self, raw: float) -> float:
        return (raw - self._config.lowest) / (self._config.highest - self._config.lowest)

    def _open(self, path: str, body: bytes | None, deadline: float) -> bytes:
        """The reply. _MayPass or RewardError says why there is none."""
        address = f"{self._config.url.rstrip('/')}/{path}"
        request = urllib.request.Request(address, data=body, headers=self._headers)
        try:
            with self._opener.open(request, timeout=_left(deadline)) as reply:
                return _read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = _words(error)
            if error.code in _PASSING or error.code >= 500:
                raise _MayPass(f"status {error.code}{said}", _retry_after(error.headers)) from None
            raise RewardError(f"the judge at {address} refuses with status {error.code}{said}") from None
        except urllib.error.URLError as error:
            raise _MayPass(str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise _MayPass(f"{type(error).__name__}: {error}") from None

    def _read_score(self, reply: bytes) -> float:
        try:
            text = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise self._nonsense(f"it answered {reply[:200]!r}, which is no chat completion") from None
        match = None
        for match in self._pattern.finditer(text if isinstance(text, str) else ""):  # noqa: B007 # the last one
            pass
        if match is None:
            raise self._nonsense(f"its reply {text!r:.200} has no score")
        try:
            raw = float(match[1])
        except (TypeError, ValueError):
            raise self._nonsense(f"its score {match[1]!r:.40} is no number") from None
        if not self._config.lowest <= raw <= self._config.highest:
            raise self._nonsense(f"its score {raw:g} is not in {self._config.lowest:g} to {self._config.highest:g}")
        return raw

    def _nonsense(self, why: str) -> Exception:
        """Without randomness the same question has the same answer."""
        return _MayPass(why) if self._config.temperature > 0 else RewardError(f"the judge at {self._config.url}: {why}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for one response has passed")
    return left


def _read(reply: Any, deadline: float) -> bytes:
    """A server that sends a byte now and then does not hold it beyond the deadline."""
    data = bytearray()
    while chunk := reply.read1(1 << 16):
        data += chunk
        if len(data) > _MAX_REPLY_BYTES:
            raise OSError(f"the reply is longer than {_MAX_REPLY_BYTES} bytes")
        _left(deadline)
    return bytes(data)


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return f": {error.read(300).decode(errors='replace').strip()}"
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(headers: Any) -> float:
    value = headers.get("Retry-After", "") if headers else ""
    return float(value) if value.isdigit() else 0.0


class Cache:
    """Scores by the hash of what was asked, in memory and, where a file is named, on the disk."""

    def __init__(self, path: str | None) -> None:
        self._memory: dict[str, float] = {}
        self._lock = Lock()
        self._file: sqlite3.Connection | None = None
        if path is not None:
            try:
                self._file = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS scores (asked TEXT PRIMARY KEY, score REAL) WITHOUT ROWID"
                )
            except sqlite3.Error as error:
                raise RewardError(f"the judge's cache_file {path} can't be used ({error}): name another file") from None

    def get(self, key: str) -> float | None:
        with self._lock:
            if key not in self._memory and self._file is not None:
                row = self._query("SELECT score FROM scores WHERE asked = ?", (key,))
                if row:
                    self._keep(key, row[0][0])
            return self._memory.get(key)

    def put(self, key: str, score: float) -> None:
        with self._lock:
            self._keep(key, score)
            self._query("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, score))

    def _keep(self, key: str, score: float) -> None:
        if len(self._memory) >= _KEPT:
            del self._memory[next(iter(self._memory))]
        self._memory[key] = score

    def _query(self, text: str, values: tuple[Any, ...]) -> list[Any]:
        """A cache that breaks costs time, not a score: it is told in the log and left alone from there."""
        if self._file is None:
            return []
        try:
            return self._file.execute(text, values).fetchall()
        except sqlite3.Error as error:
            print(f"the judge's cache is given up: {error}", file=sys.stderr, flush=True)
            self._file.close()
            self._file = None
            return []

"""The judge against a server that answers as OpenAI's does, well and badly."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards import judge as judge_module
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.judge import Judge
from megatron_dgrpo.rewards.pool import RewardPool


def chat(content: Any) -> bytes:
    return json.dumps({"object": "chat.completion", "choices": [{"message": {"content": content}}]}).encode()


def right(question: str) -> bytes:
    """1 when the response is the ground truth."""
    response = question.split("Response:\n")[1].split("\n\nGround-truth")[0]
    answer = question.split("Ground-truth answer:\n")[1].split("\n\nReply")[0]
    return chat(f"Answer: {int(response == answer)}")


class Server:
    """`script` holds what is said before `right` is: (status, body or seconds to wait, headers)."""

    def __init__(self) -> None:
        self.script: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Callable[[str], bytes] = right
        self.at_once = self.most_at_once = 0
        self.pause_s = 0.0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": "judge"}]}).encode(), {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.headers.append(self.headers)
                    status, said, headers = outer.script.pop(0) if outer.script else (200, None, {})
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                time.sleep(outer.pause_s)
                with lock:
                    outer.at_once -= 1
                self._send(status, outer.answer(body["messages"][0]["content"]) if said is None else said, headers)

            def _send(self, status: int, body: bytes | float, headers: dict[str, str]) -> None:
                if isinstance(body, float):  # a byte now and then, never an end
                    self.send_response(status)
                    self.end_headers()
                    for _ in range(int(body / 0.05)):
                        try:
                            self.wfile.write(b" ")
                            self.wfile.flush()
                        except OSError:
                            return
                        time.sleep(0.05)
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judge_module, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def config(url: str, **changes: Any) -> settings.Judge:
    return settings.Judge(kind="judge", url=url, model="judge", **({"timeout_s": 5.0} | changes))


def ask(made: settings.Judge, *texts: str, answer: str = "yes") -> list[Any]:
    found: dict[int, Any] = {}
    samples = [Sample("r", text, prompt="Is it {so}?", answer=answer) for text in texts]
    Judge(made).score_all(samples, lambda i, v: found.update({i: v.why if isinstance(v, Failure) else v}))
    return [found[i] for i in range(len(texts))]


def test_scores_and_what_is_asked(server: Server) -> None:
    assert ask(config(server.url), "yes", "no", "{yes}") == [1.0, 0.0, 0.0]
    sent = next(body for body in server.asked if "Response:\nno" in body["messages"][0]["content"])
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("judge", 0.0, 64)
    assert "Is it {so}?" in sent["messages"][0]["content"] and "Authorization" not in server.headers[0]


def test_a_scale_and_the_last_match_count(server: Server) -> None:
    made = config(server.url, lowest=1, highest=5, pattern=r"(\d+)/5")
    for reply, score in (("first 1/5, no: 4/5", 0.75), ("1/5", 0.0), ("5/5", 1.0)):
        server.answer = lambda _, reply=reply: chat(reply)
        assert ask(made, reply) == [score]
    server.answer = lambda _: chat("9/5")
    assert "its score 9 is not in 1 to 5" in ask(made, "x")[0]


def test_of_a_long_response_the_end_is_shown(server: Server) -> None:
    assert ask(config(server.url, max_response_chars=3), "no, yes") == [1.0]


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(server.url, api_key_variable="JUDGE_KEY")
    with pytest.raises(RewardError, match="JUDGE_KEY, which is not set"):
        Judge(made)
    monkeypatch.setenv("JUDGE_KEY", "abc")
    assert ask(made, "yes") == [1.0] and server.headers[0]["Authorization"] == "Bearer abc"
    assert "abc" not in made.model_dump_json()


def test_what_passes_is_tried_again(server: Server) -> None:
    server.script = [(500, b"oh", {}), (429, b"", {"Retry-After": "0"}), (503, b"", {})]
    assert ask(config(server.url), "yes") == [1.0] and len(server.asked) == 4
    server.script = [(500, b"out of memory", {})] * 3
    (why,) = ask(config(server.url, retries=2), "no")
    assert "asked 3 times" in why and "status 500: out of memory" in why


def test_what_stays_is_not_tried_again(server: Server) -> None:
    for status in (400, 401, 404):
        server.script, server.asked = [(status, b"no such model", {})], []
        assert f"refuses with status {status}: no such model" in ask(config(server.url), "yes")[0]
        assert len(server.asked) == 1
    server.script = [(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"})]
    assert "refuses with status 302" in ask(config(server.url), "yes")[0]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"<html>", "no chat completion"),
        (b"[1, 2]", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (chat(None), "its reply None has no score"),
        (chat("It is correct."), "has no score"),
        (chat("Answer: 2"), "its score 2 is not in 0 to 1"),
        (chat("Answer: -1"), "its score -1 is not in 0 to 1"),
        (chat("Answer: " + "9" * 400), "is not in 0 to 1"),
        (b" " * 2**21, "is longer than"),
    ],
)
def test_nonsense_is_no_score(server: Server, reply: bytes, why: str) -> None:
    server.answer = lambda _: reply
    assert why in ask(config(server.url, retries=0), "yes")[0]
    asked = len(server.asked)
    assert asked == 1
    if b"longer" not in why.encode():
        server.answer, server.script = right, [(200, reply, {})]
        assert ask(config(server.url, temperature=0.5), "yes") == [1.0]  # with randomness it may do better


def test_a_judge_that_is_slow_or_down_ends_in_time(server: Server) -> None:
    start = time.monotonic()
    server.script = [(200, 20.0, {})]
    assert "gave no score" in ask(config(server.url, timeout_s=0.5), "yes")[0]
    server.pause_s = 3.0
    assert "timed out" in ask(config(server.url, timeout_s=0.5), "yes")[0]
    server.script, server.pause_s = [(429, b"", {"Retry-After": "3600"})], 0.0
    assert "asked once" in ask(config(server.url, timeout_s=0.5), "yes")[0]
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        (why,) = ask(config(down, retries=1), "yes")
        assert "asked 2 times" in why and "refused" in why
        with RewardPool(1) as pool:
            (problem,) = pool.problems([config(down)])
            assert "does not answer" in problem and "start it, or correct url" in problem
            assert pool.problems([config(server.url)] * 50) == []
            (problem,) = pool.problems([config(server.url).model_copy(update={"model": "other"})])
            assert "has no model 'other'; it has judge" in problem
    assert time.monotonic() - start < 60


def test_many_at_a_time_and_no_more_than_asked_for(server: Server) -> None:
    server.pause_s = 0.1
    assert ask(config(server.url, concurrency=4), *(f"text {i}" for i in range(12))) == [0.0] * 12
    assert 2 <= server.most_at_once <= 4


def test_the_same_question_is_asked_once_and_remembered(server: Server, tmp_path: Path) -> None:
    made = config(server.url, cache_file=str(tmp_path / "scores.sqlite"))
    assert ask(made, "yes", "no", "yes") == [1.0, 0.0, 1.0] and len(server.asked) == 2
    assert ask(made, "yes", "no") == [1.0, 0.0] and len(server.asked) == 2  # another process would find them, too
    assert ask(made, "yes", answer="no") == [0.0] and len(server.asked) == 3
    server.script = [(404, b"", {})]
    assert "404" in ask(made, "new")[0] and ask(made, "new") == [0.0]  # a failure is not remembered
    (tmp_path / "bad").write_text("no database at all, but long enough to be looked at as one")
    with pytest.raises(RewardError, match="cache_file .* can't be used"):
        Judge(made.model_copy(update={"cache_file": str(tmp_path / "bad")}))


def test_fields_of_the_row_and_a_template_that_they_do_not_fill(server: Server) -> None:
    server.answer = lambda question: chat(question)
    made = config(
        server.url, template="{fields[rubric]}: {response} {{}}", pattern=r"^Answer: 1: (\d) \{\}$", highest=9
    )
    found: dict[int, Any] = {}
    samples = [Sample("a", "7", fields={"rubric": "Answer: 1"}), Sample("b", "7")]
    Judge(made).score_all(samples, lambda i, v: found.update({i: v}))
    assert found[0] == pytest.approx(7 / 9) and "template can't be filled in: KeyError('rubric')" in found[1].why


def test_in_a_worker(server: Server) -> None:
    with RewardPool(2) as pool:
        samples = [Sample(f"r{i}", "yes" if i % 2 else "no", answer="yes") for i in range(40)]
        (found,) = pool.score([config(server.url)], samples)
        assert found == [float(i % 2) for i in range(40)]

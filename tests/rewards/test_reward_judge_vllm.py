"""The judge against a real vLLM server with a tiny model: what it says is nonsense, and is taken as such."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from megatron_dgrpo.config import rewards as settings
from megatron_dgrpo.errors import RewardError
from megatron_dgrpo.rewards.base import Failure, Sample
from megatron_dgrpo.rewards.judge import Judge
from megatron_dgrpo.rewards.pool import RewardPool
from megatron_dgrpo.testing.tiny import save_tiny_qwen3

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def _save_chat_model(folder: Path) -> None:
    """Every byte is a token, so that any text can be asked and any reply is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    end = len(letters)
    save_tiny_qwen3(folder, vocab_size=end + 2, special_ids=(end, end, end), max_positions=2048)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge")
    _save_chat_model(folder)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "judge",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
        "--dtype", "float32",
    ]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=env)
    os.environ["no_proxy"] = "127.0.0.1"
    try:
        address = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + 700
        while _problem(address) is not None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _judge(url: str, **changes: Any) -> settings.Judge:
    return settings.Judge(kind="judge", url=url, model="judge", **({"max_tokens": 8} | changes))


def _problem(url: str) -> str | None:
    try:
        Judge(_judge(url)).problem()
    except RewardError as error:
        return str(error)
    return None


def _why(value: float | Failure) -> str:
    assert isinstance(value, Failure)
    return value.why


def test_nonsense_scores_and_refusals(url: str) -> None:
    samples = [Sample(f"r{i}", f"response {i}", prompt="Is it so?", answer="yes") for i in range(6)]
    with RewardPool(1) as pool:
        (nonsense,) = pool.score([_judge(url)], samples)
        assert all("has no score" in _why(value) for value in nonsense), nonsense
        (empty,) = pool.score([_judge(url, pattern=r"()$")], samples)
        assert all("is no number" in _why(value) for value in empty), empty
        (long,) = pool.score([_judge(url)], [Sample("r", "x" * 2000, prompt="?", answer="yes")])
        assert "refuses with status 400" in _why(long[0])
        (problem,) = pool.problems([_judge(url).model_copy(update={"model": "other"})])
        assert "has no model 'other'; it has judge" in problem


def test_scores_after_nonsense(url: str) -> None:
    """64 random bytes hold a digit in 9 of 10 replies; the others are asked again."""
    made = _judge(url, pattern=r"([0-9])", highest=9.0, temperature=1.0, max_tokens=64)
    samples = [Sample(f"r{i}", f"response {i}", prompt="Is it so?", answer="yes") for i in range(20)]
    with RewardPool(1) as pool:
        (scores,) = pool.score([made], samples)
        again = pool.score([made], samples)[0]
    assert all(isinstance(score, float) and round(9 * score, 6) in range(10) for score in scores), scores
    assert len(set(scores)) > 2 and again == scores  # the worker remembers them

"""Sampling through an engine host: log-probs against transformers, seeds, ends, bad requests, clients that go."""

import os
import signal
import tempfile
import threading
import time

import numpy as np
import pytest
from rollout_support import BLOCK, CONTEXT, VOCAB, Host, difference, engine_host, greedy, hf_logprobs_of

from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.messages import GenerateRequest, TensorSpec, sample_seed
from megatron_dgrpo.testing.distributed import run_forked


@pytest.fixture(scope="module")
def host(untied_folders):
    with engine_host(untied_folders[0]) as running:
        yield running


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def request(name: str = "p", length: int = 20, seeds=(1,), max_tokens: int = 12, temperature: float = 1.0, stop=()):
    return GenerateRequest(name, prompt(length), tuple(seeds), max_tokens, temperature, tuple(stop))


def test_the_description(host, untied_folders):
    info = host.client.describe()
    assert info.pid == host.child.pid and info.model_path == untied_folders[0]
    assert (info.vocab_size, info.max_model_len, info.dtype) == (VOCAB, CONTEXT, "float32")
    assert info.vllm_version == "0.32.0" and info.whole and info.num_unfinished == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_the_sampling(host, untied_folders, temperature):
    requests = [request(f"p{n}", n, range(4), 24, temperature) for n in (1, 20, BLOCK + 70)]
    completions = list(host.client.generate(requests, deadline_s=60))
    assert len(completions) == 12
    jobs = [
        (next(r.prompt_tokens for r in requests if r.prompt_id == c.prompt_id), c.tokens, temperature)
        for c in completions
    ]
    for mine, theirs in zip(completions, run_forked(hf_logprobs_of, untied_folders[0], jobs), strict=True):
        assert mine.logprobs.dtype == np.float32 and len(mine.tokens) == 24
        assert np.abs(mine.logprobs - theirs).max() <= 1e-4
        assert np.abs(mine.logprobs.sum()) > 1
    other_temperature = run_forked(hf_logprobs_of, untied_folders[0], [(*jobs[0][:2], 1.7 - temperature)])[0]
    assert np.abs(completions[0].logprobs - other_temperature).max() > 0.01


def test_seeds_make_the_same_samples_in_any_company(host):
    seeds = [sample_seed(0, 3, "p", sample) for sample in range(4)]
    together = host.answers([request(seeds=seeds), request("q", 40, seeds)])
    assert difference(together, host.answers([request("q", 40, seeds), request(seeds=seeds)])) <= 1e-4
    for sample, seed in enumerate(seeds):
        alone = host.answers([request(seeds=[seed])])[("p", 0)]
        assert np.array_equal(alone[0], together[("p", sample)][0])
    assert len({tuple(tokens) for tokens, _ in together.values()}) == 8
    assert len(set(seeds)) == 4 and sample_seed(0, 4, "p", 0) not in seeds and sample_seed(1, 3, "p", 0) not in seeds


def test_a_prompt_is_computed_once_for_its_samples(host):
    fresh_prompt = GenerateRequest("once", prompt(3 * BLOCK + 5, seed=77), tuple(range(6)), 4, 1.0, ())
    cached = sorted(c.num_cached_tokens for c in host.client.generate([fresh_prompt], deadline_s=60))
    assert cached == [0] + [3 * BLOCK] * 5


def test_a_response_ends_with_its_stop_token_or_its_length(host):
    free = host.answers([request(max_tokens=30, temperature=0.0)])[("p", 0)][0]
    stop = int(free[10])
    first = int(np.flatnonzero(free == stop)[0])
    (stopped,) = host.client.generate([request(max_tokens=30, temperature=0.0, stop=[stop, 5])], deadline_s=60)
    expected = next(i for i, t in enumerate(free) if t in (stop, 5))
    assert expected <= first
    assert stopped.finish_reason == "stop" and np.array_equal(stopped.tokens, free[: expected + 1])
    assert len(stopped.logprobs) == len(stopped.tokens) == len(stopped.weight_versions)
    (cut,) = host.client.generate([request(max_tokens=3, temperature=0.0)], deadline_s=60)
    assert cut.finish_reason == "length" and np.array_equal(cut.tokens, free[:3])


def test_every_id_of_the_vocabulary_can_be_sampled(host):
    """Up to the last one, a tokenizer or not: in 6000 tokens of a hot sampling, all of them should come up."""
    requests = [GenerateRequest(f"p{i}", prompt(2, i), tuple(range(30)), 100, 2.0, ()) for i in range(2)]
    tokens = np.concatenate([c.tokens for c in host.client.generate(requests, deadline_s=120)])
    assert len(tokens) == 6000 and set(tokens) == set(range(VOCAB))


# ---- bad requests ----


def test_every_problem_of_every_request_is_listed_and_the_engine_lives_on(host):
    bad = [
        request("good"),
        GenerateRequest("empty", np.zeros(0, np.int32), (1,), 4, 1.0, ()),
        GenerateRequest("outside", np.array([3, VOCAB, -1], np.int32), (1,), 4, 1.0, ()),
        GenerateRequest("stop", prompt(3), (1,), 4, 1.0, (VOCAB,)),
        request("long", CONTEXT, max_tokens=1),
        request("longer", CONTEXT - 3, max_tokens=4),
        request("nothing", max_tokens=0),
        request("hot", temperature=float("nan")),
        request("hotter", temperature=2.5),
        request("cold", temperature=-1.0),
        request("cool", temperature=0.001),
        request("seedless", seeds=()),
        request("seed", seeds=(-1,)),
        GenerateRequest("real", np.zeros(3, np.float32), (1,), 4, 1.0, ()),
    ]
    with pytest.raises(RolloutError) as caught:
        list(host.client.generate(bad, deadline_s=60))
    lines = str(caught.value).splitlines()[1:]
    expected = [
        ("empty", "its prompt is empty"),
        ("outside", f"ids [-1, {VOCAB}] are outside of the vocabulary of {VOCAB}"),
        ("stop", f"ids [{VOCAB}] are outside"),
        ("long", f"{CONTEXT} prompt tokens and 1 new ones are more than the engine's context of {CONTEXT}"),
        ("longer", "more than the engine's context"),
        ("nothing", "asks for no token"),
        ("hot", "temperature is nan"),
        ("hotter", "temperature is 2.5; vLLM takes 0 (greedy) to 2"),
        ("cold", "temperature is -1.0"),
        ("cool", "below 0.01"),
        ("seedless", "asks for no sample"),
        ("seed", "seeds are not between"),
        ("real", "not a row of token ids"),
    ]
    assert len(lines) == len(expected)
    for line, (name, text) in zip(lines, expected, strict=True):
        assert f"prompt {name!r}: " in line and text in line
    assert host.client.describe().num_unfinished == 0
    assert len(host.answers([request("longest", CONTEXT - 4, max_tokens=4)])[("longest", 0)][0]) == 4


def test_a_prompt_twice_in_a_call_is_refused(host):
    with pytest.raises(RolloutError, match=r"prompts \['p'\] are there twice"):
        host.client.generate([request(), request()], deadline_s=60)


# ---- clients that stop, die, or come with the wrong key ----


def wait_until_idle(host: Host) -> None:
    deadline = time.monotonic() + 60
    while host.client.describe().num_unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert host.client.describe().num_unfinished == 0


def long_requests() -> list[GenerateRequest]:
    return [request(f"long{i}", 20, range(8), 480) for i in range(4)]


def test_what_nobody_waits_for_is_not_generated(host):
    completions = host.client.generate([request("short", max_tokens=1), *long_requests()], deadline_s=60)
    assert next(completions).prompt_id == "short"
    assert host.client.describe().num_unfinished == 32  # described between two steps
    completions.close()
    wait_until_idle(host)


def test_a_deadline_ends_the_wait_and_the_work(host):
    with pytest.raises(
        RolloutError, match=r"the deadline passed; waited for 32 of 32 samples from the engine at unix:"
    ):
        list(host.client.generate(long_requests(), deadline_s=0.2))
    wait_until_idle(host)


def die_while_asking(address, key):
    client = EngineClient.connect(address, key, deadline_s=60, owner=False)
    client.generate(long_requests(), deadline_s=60)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_client_takes_its_samples_with_it(host):
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_forked(die_while_asking, host.address, host.key)
    wait_until_idle(host)
    assert host.answers([request()])


def test_two_clients_get_their_own_answers(host):
    other = host.connect()
    mine = host.client.generate([request("a", 10, range(4))], deadline_s=60)
    theirs = other.generate([request("b", 10, range(4))], deadline_s=60)
    assert {c.prompt_id for c in theirs} == {"b"} and {c.prompt_id for c in mine} == {"a"}
    other.close()


def test_a_wrong_key_is_refused_at_once(host):
    start = time.monotonic()
    with pytest.raises(RolloutError, match="refused this run's key"):
        EngineClient.connect(host.address, "0" * 64, deadline_s=60)
    assert time.monotonic() - start < 20
    host.client.describe()  # the refusal is in the log by now
    assert "came with a wrong key" in host.child.last_words()


# ---- half-done updates ----


def test_an_update_must_not_begin_while_samples_are_unfinished(host):
    completions = host.client.generate(long_requests(), deadline_s=60)
    with pytest.raises(RolloutError, match="32 samples are unfinished"):
        host.client.begin_update(1, [], "/dev/shm/nothing", 64, deadline_s=60)
    completions.close()
    wait_until_idle(host)
    assert host.client.describe().whole and list(completions) == []


def test_an_update_without_a_beginning_is_refused(host):
    with pytest.raises(TransferError, match="No update is under way"):
        host.client.finish_update(1, deadline_s=60)
    with pytest.raises(TransferError, match="No update is under way"):
        host.client.bucket_loaded(host.client.load_bucket(["x"], [0], deadline_s=60), deadline_s=60)
    host.client.abandon_update()
    assert host.client.describe().whole and host.answers([request()])


def begin_and_go(folder, address, key, path, again):
    """A client that dies after it began an update; another that finishes one."""
    from rollout_support import whole_tensors

    tensors = whole_tensors(folder)
    content = b"".join(t.numpy().tobytes() for t in tensors.values())
    with open(path, "wb") as file:
        file.write(content)
    sizes = [t.numel() * 4 for t in tensors.values()]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    client = EngineClient.connect(address, key, deadline_s=60, owner=False)
    specs = [TensorSpec(n, tuple(t.shape), "float32") for n, t in tensors.items()]
    client.begin_update(5, specs, path, len(content), deadline_s=60)
    half = len(tensors) // 2
    client.bucket_loaded(client.load_bucket(list(tensors)[:half], offsets[:half], deadline_s=60), deadline_s=60)
    if not again:
        os.kill(os.getpid(), signal.SIGKILL)
    other = EngineClient.connect(address, key, deadline_s=60, owner=False)
    refusals = []
    for question in (
        lambda: other.finish_update(5, deadline_s=60),
        lambda: list(other.generate(greedy(1), deadline_s=60)),
    ):
        try:
            question()
        except (TransferError, RolloutError) as error:
            refusals.append(str(error))
    client.bucket_loaded(client.load_bucket(list(tensors)[half:], offsets[half:], deadline_s=60), deadline_s=60)
    client.finish_update(5, deadline_s=60)
    return refusals


def test_a_client_that_dies_in_an_update_leaves_an_engine_that_refuses(host, untied_folders, tmp_path):
    old = host.answers(greedy(1))
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_forked(begin_and_go, untied_folders[0], host.address, host.key, str(tmp_path / "file"), False)
    deadline = time.monotonic() + 60
    while host.client.describe().whole and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RolloutError, match="not whole: an update after version 0 is half done or has failed"):
        host.answers(greedy(1))
    refusals = run_forked(begin_and_go, untied_folders[0], host.address, host.key, str(tmp_path / "file"), True)
    assert "is updating the weights" in refusals[0] and "not whole" in refusals[1]
    info = host.client.describe()
    assert info.whole and info.weight_version == 5
    assert difference(host.answers(greedy(1)), old) <= 1e-4


# ---- the end of a host ----


def host_with_a_broken_engine(folder, address, key):
    from megatron_dgrpo.rollout import host

    os.environ.update(host._ENVIRONMENT)
    from megatron_dgrpo.rollout.engine import Engine

    step = Engine.step

    def breaks(self):
        if "1" in self._unfinished:  # not the warm-up
            if len(self._unfinished) < 64:  # both clients' samples
                return []
            raise RuntimeError("the cable came off")
        return step(self)

    Engine.step = breaks
    host.serve(
        address=address,
        key=key,
        model_path=folder,
        dtype="float32",
        max_model_len=CONTEXT,
        kv_cache_bytes=2**26,
        max_num_seqs=32,
        prefix_cache=True,
        threads=1,
    )


def test_an_engine_that_breaks_says_so_to_all_who_wait_and_ends(untied_folders):
    ends, key = [], "k" * 32

    def run(address):
        try:
            run_forked(host_with_a_broken_engine, untied_folders[0], address, key, preload="engine")
        except AssertionError as error:
            ends.append(str(error))

    with tempfile.TemporaryDirectory() as home:
        thread = threading.Thread(target=run, args=(f"unix:{home}/engine",))
        thread.start()
        clients = [EngineClient.connect(f"unix:{home}/engine", key, deadline_s=60) for _ in range(2)]
        waiting = [client.generate(long_requests(), deadline_s=60) for client in clients[::-1]]
        for completions in waiting:
            with pytest.raises(RolloutError, match="the engine broke while generating: RuntimeError: the cable|closed"):
                next(completions)
        thread.join(60)
    assert "the cable came off" in ends[0]


def test_a_host_ends_with_its_last_owner(untied_folders):
    with engine_host(untied_folders[0]) as host:
        second = host.connect(owner=True)
        passer_by = host.connect()
        passer_by.close()
        host.client.close()
        assert second.describe().whole
        second.close()
        assert host.child.wait(60) == 0


def test_a_killed_host_is_an_error_that_names_it_and_one_told_to_stop_stops(untied_folders):
    with engine_host(untied_folders[0]) as host:
        named = host.connect(name="engine 'student'")
        killer = threading.Timer(0.3, host.child.kill)
        killer.start()
        with pytest.raises(
            RolloutError, match=r"engine 'student' closed the connection .*; waited for 32 of 32 samples"
        ):
            list(named.generate(long_requests(), deadline_s=60))
        killer.join()
    with engine_host(untied_folders[0]) as host:
        host.connect().shutdown()
        assert host.child.wait(60) == 0
        with pytest.raises(RolloutError, match="closed the connection"):
            host.client.describe()

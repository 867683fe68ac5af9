"""Shaped sampling, prompts in pieces, and engines that give the same bits again."""

import os
import signal

import numpy as np
import pytest
from rollout_support import BLOCK, VOCAB, difference, engine_host

from megatron_dgrpo.rollout.client import EngineClient
from megatron_dgrpo.rollout.messages import GenerateRequest, Shaping, sample_seed
from megatron_dgrpo.testing.distributed import run_forked

SHAPES = {
    "top_p": Shaping(top_p=0.6),
    "top_k": Shaping(top_k=4),
    "min_p": Shaping(min_p=0.2),
    "penalties": Shaping(presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.3),
    "all": Shaping(top_p=0.8, top_k=9, min_p=0.02, frequency_penalty=0.5),
}
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def host(untied_folders):
    """Prompts in pieces of at most 48 tokens a step, all sequences together."""
    with engine_host(untied_folders[0], chunked_prefill=48, max_num_seqs=32) as running:
        yield running


def request(name="p", length=20, seeds=(1,), max_tokens=12, shaping=Shaping(), seed=0):  # noqa: B008
    prompt = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    return GenerateRequest(name, prompt, tuple(seeds), max_tokens, TEMPERATURE, (), shaping)


# ---- prompts in pieces ----


def test_seeds_make_the_same_samples_however_prompts_are_cut(host, untied_folders):
    seeds = [sample_seed(0, 3, "p", sample) for sample in range(4)]
    requests = [
        request("long", 3 * BLOCK + 17, seeds),
        request("short", 9, seeds),
        request("other", 150, seeds, seed=5),
    ]
    together = host.answers(requests)
    assert len({tuple(tokens) for tokens, _ in together.values()}) == 12
    assert difference(together, host.answers(requests[::-1])) <= 1e-4
    for one in requests:
        for sample, seed in enumerate(seeds):
            alone = host.answers(
                [request(one.prompt_id, len(one.prompt_tokens), [seed], seed=5 * (one is requests[2]))]
            )
            assert np.array_equal(alone[(one.prompt_id, 0)][0], together[(one.prompt_id, sample)][0])
    with engine_host(untied_folders[0]) as in_one_piece:
        assert difference(together, in_one_piece.answers(requests)) <= 1e-4


def test_greedy_and_seeded_requests_meet_in_a_step(host):
    greedy = GenerateRequest("g", request(length=200, seed=3).prompt_tokens, (0,), 12, 0.0, ())
    seeded = request("s", 170, range(3), seed=4)
    together = host.answers([greedy, seeded])
    assert difference(together, host.answers([greedy]) | host.answers([seeded])) <= 1e-4


# ---- shaped sampling ----


def shaped_logprobs(folder, jobs):
    """Of each token, from transformers' logits by the definitions; -inf for one that could not have been drawn."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for prompt, tokens, shape in jobs:
        ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0, len(prompt) - 1 : -1].double().numpy()
        for t, logits_V in enumerate(logits_TV):
            counts_V = np.bincount(tokens[:t], minlength=VOCAB)
            seen_V = (counts_V + np.bincount(prompt, minlength=VOCAB)) > 0
            repeated_V = np.where(
                logits_V > 0, logits_V / shape.repetition_penalty, logits_V * shape.repetition_penalty
            )
            logits_V = np.where(seen_V, repeated_V, logits_V)
            logits_V = logits_V - shape.frequency_penalty * counts_V - shape.presence_penalty * (counts_V > 0)
            p_V = np.exp((logits_V - logits_V.max()) / TEMPERATURE)
            p_V[p_V < shape.min_p] = 0.0
            order = np.argsort(-p_V)
            if shape.top_k:
                p_V[order[shape.top_k :]] = 0.0
            p_V /= p_V.sum()
            before = np.cumsum(p_V[order]) - p_V[order]
            p_V[order[before >= shape.top_p]] = 0.0
            with np.errstate(divide="ignore"):
                found.append(np.log(p_V / p_V.sum())[tokens[t]])
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logprobs_are_those_of_the_distribution_that_is_sampled_from(host, untied_folders, shape):
    asked = [request("p", 30, range(3), 20, shape), request("q", BLOCK + 40, range(3), 20, shape, seed=8)]
    prompts = {r.prompt_id: r.prompt_tokens for r in asked}
    answers = list(host.client.generate(asked, deadline_s=60))
    jobs = [(prompts[c.prompt_id], c.tokens, shape) for c in answers]
    theirs = np.asarray(run_forked(shaped_logprobs, untied_folders[0], jobs))
    mine = np.concatenate([c.logprobs for c in answers])
    assert np.isfinite(theirs).all() and np.abs(mine - theirs).max() <= 1e-4
    plain = np.asarray(run_forked(shaped_logprobs, untied_folders[0], [(*job[:2], Shaping()) for job in jobs]))
    assert np.abs(mine - plain).max() > 0.1


# ---- the same bits ----


def bits(completions):
    return {(c.prompt_id, c.sample): (c.tokens.tobytes(), c.logprobs.tobytes()) for c in completions}


def batch(count=5):
    """Lengths that make ends fall into different steps; prompts that share blocks."""
    return [request(f"p{i}", BLOCK + 10 + 31 * i, range(4), 40 + 11 * i) for i in range(count)]


def die_in_the_middle(address, key):
    client = EngineClient.connect(address, key, deadline_s=60, owner=False)
    answers = client.generate(batch(), deadline_s=60)
    for _ in range(6):
        next(answers)
    os.kill(os.getpid(), signal.SIGKILL)


def alone():
    """A single sample, whose bits change with a cached block of its prompt, and with company."""
    return [request("s", BLOCK + 1, (3,), 16)]


@pytest.mark.parametrize("chunked_prefill", [None, 100], ids=["whole", "pieces"])
def test_a_deterministic_engine_gives_the_same_bits_whatever_was_before(untied_folders, chunked_prefill):
    settings = {"deterministic": True, "max_num_seqs": 16, "chunked_prefill": chunked_prefill}
    with engine_host(untied_folders[0], **settings) as host:
        first, single = (bits(host.client.generate(asked(), deadline_s=60)) for asked in (batch, alone))
        assert len(first) == 20
        with pytest.raises(AssertionError, match="SIGKILL"):
            run_forked(die_in_the_middle, host.address, host.key)
        assert bits(host.client.generate(alone(), deadline_s=60)) == single
        assert bits(host.client.generate(batch(), deadline_s=60)) == first
        # calls that come meanwhile wait for their turn, and one that is given up is never begun
        others = [host.connect() for _ in range(4)]
        running = host.client.generate(batch(), deadline_s=60)
        waiting = [other.generate((alone if i < 2 else batch)(), deadline_s=60) for i, other in enumerate(others)]
        waiting[2].close()
        others[3].close()
        assert bits(running) == first and bits(waiting[0]) == bits(waiting[1]) == single
        assert host.client.describe().num_unfinished == 0
    with engine_host(untied_folders[0], **settings) as another:
        assert bits(another.client.generate(alone(), deadline_s=60)) == single
        assert bits(another.client.generate(batch(), deadline_s=60)) == first

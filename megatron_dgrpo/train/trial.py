"""The process of `dgrpo generate` and `dgrpo eval`: prompts to engines that have their folder's own weights, and what
the responses are worth. It is no rank of anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_dgrpo.config.loader import load
from megatron_dgrpo.config.rewards import AnyReward
from megatron_dgrpo.config.schema import Config, Evaluation
from megatron_dgrpo.data.chat import prompt_ids
from megatron_dgrpo.data.dataset import Rows
from megatron_dgrpo.data.lengths import check_lengths
from megatron_dgrpo.data.rows import PromptRow
from megatron_dgrpo.data.tokenizer import Tokenizer
from megatron_dgrpo.errors import ConfigError, DataError, listing
from megatron_dgrpo.observe.progress import Board
from megatron_dgrpo.rewards.base import Sample
from megatron_dgrpo.rewards.checks import reward_problems
from megatron_dgrpo.rewards.compose import settle, total
from megatron_dgrpo.rewards.pool import RewardPool
from megatron_dgrpo.rollout.messages import Completion, GenerateRequest, Shaping, sample_seed
from megatron_dgrpo.rollout.pool import Pool
from megatron_dgrpo.train.engines import Engines
from megatron_dgrpo.train.evaluation import EVALUATION_SEED


def main(
    *,
    config_path: str,
    answer_path: str,
    engines: Mapping[str, Sequence[str]],
    key: str,
    control: str,
    samples: int,
    prompts: int | None,
    out: str | None,
    scored: bool,
    token_ids: bool,
    logprobs: bool,
) -> None:
    """Target of the supervisor: leaves figures, or what is wrong with the input, in a file."""
    config = load(config_path)
    assert config.evaluation is not None
    answer: dict[str, Any] = {"problem": ""}
    try:
        tokenizer = Tokenizer.load(config.models[config.student].path)
        rows = _rows(config, tokenizer, prompts, scored)
        pools = Engines(config, engines, key, control)
        pools.restore = lambda name: Pool.given(pools.client(name).targets(everywhere=False))
        trial = Trial(config.evaluation, tokenizer, rows, samples, token_ids=token_ids, logprobs=logprobs)
        pool = RewardPool(config.reward_workers, log_dir=Path(config_path).parent / "logs") if scored else None
        try:
            answer |= trial.run(pools.client(config.evaluation.engine), _deadline_s(config), pool, out)
        finally:
            if pool is not None:
                pool.close()
    except (ConfigError, DataError) as error:
        answer["problem"] = str(error)
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _deadline_s(config: Config) -> float:
    assert config.evaluation is not None
    return config.engines[config.evaluation.engine].request_timeout_s


def _rows(config: Config, tokenizer: Tokenizer, prompts: int | None, scored: bool) -> list[PromptRow]:
    settings = config.evaluation
    assert settings is not None
    rows = Rows(settings.data)[:prompts]
    if not rows or len(rows) < (prompts or 0):
        raise DataError(f"{settings.data.where} has {len(rows)} rows, and {prompts or 'some'} are asked for")
    check_lengths(
        rows,
        tokenizer,
        limit=config.engines[settings.engine].max_model_len,
        setting=f"engines.{settings.engine}.max_model_len",
        response_tokens=settings.sampling.max_tokens,
    )
    if scored:
        found = reward_problems(settings.rewards, "evaluation", ((row.name, row.fields) for row in rows))
        if found:
            raise ConfigError(listing("The rewards can't be computed:", found))
    return rows


class Trial:
    def __init__(
        self,
        settings: Evaluation,
        tokenizer: Tokenizer,
        rows: Sequence[PromptRow],
        samples: int,
        *,
        token_ids: bool,
        logprobs: bool,
    ) -> None:
        self.settings, self.tokenizer, self.rows, self.samples = settings, tokenizer, rows, samples
        self.token_ids, self.logprobs = token_ids, logprobs
        self._row_of = {row.name: row for row in rows}

    def run(self, engine: Pool, deadline_s: float, rewards: RewardPool | None, out: str | None) -> dict[str, Any]:
        requests = [self._request(row) for row in self.rows]
        answers = engine.generate(requests, deadline_s=deadline_s)
        watched = Board().over(answers, "generate", len(requests) * self.samples, "samples")
        lengths, truncated, left_out = list[int](), 0, 0
        scores: list[list[dict[str, float]]] = []
        file = open(out, "w", encoding="utf-8") if out is not None else None
        try:
            for name, completions in self._by_prompt(watched):
                lengths += [len(one.tokens) for one in completions]
                truncated += sum(one.finish_reason == "length" for one in completions)
                texts = [self.tokenizer.decode(one.tokens) for one in completions]
                found = self._score(rewards, self._row_of[name], texts, left_out)
                if rewards is not None and found is None:
                    left_out += 1
                elif found is not None:
                    scores.append(found)
                self._write(file, self._row_of[name], completions, texts, found)
        finally:
            if file is not None:
                file.close()
        return {
            "prompts": len(self.rows),
            "samples": self.samples,
            "responses": len(lengths),
            "length": float(np.mean(lengths)),
            "truncated": truncated / len(lengths),
            "left_out": left_out,
        } | (figures(self.settings.rewards, scores) if rewards is not None else {})

    def _request(self, row: PromptRow) -> GenerateRequest:
        sampling = self.settings.sampling
        return GenerateRequest(
            prompt_id=row.name,
            prompt_tokens=np.asarray(prompt_ids(self.tokenizer, row), np.int32),
            seeds=tuple(sample_seed(EVALUATION_SEED, 0, row.name, sample) for sample in range(self.samples)),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop_token_ids=self.tokenizer.eos_ids,
            shaping=Shaping(**sampling.shaping),  # type: ignore[arg-type]
        )

    def _by_prompt(self, completions: Iterator[Completion]) -> Iterator[tuple[str, list[Completion]]]:
        """A prompt's samples in their order, once all of them are there."""
        pending: dict[str, dict[int, Completion]] = {}
        for one in completions:
            found = pending.setdefault(one.prompt_id, {})
            found[one.sample] = one
            if len(found) == self.samples:
                done = pending.pop(one.prompt_id)
                yield one.prompt_id, [done[sample] for sample in range(self.samples)]

    def _score(
        self, pool: RewardPool | None, row: PromptRow, texts: Sequence[str], left_out: int
    ) -> list[dict[str, float]] | None:
        """None where nothing is scored, or a reward failed and its settings leave the prompt out."""
        if pool is None:
            return None
        samples = [Sample(row.name, text, row.prompt, row.answer, row.fields) for text in texts]
        rewards = self.settings.rewards
        found = pool.score(rewards, samples)
        settled = settle(rewards, found, samples, num_prompts=len(self.rows), skipped_before=left_out)
        if settled.words:
            print(settled.words, flush=True)
        return settled.scores if all(settled.kept) else None

    def _write(
        self,
        file: IO[str] | None,
        row: PromptRow,
        completions: Sequence[Completion],
        texts: Sequence[str],
        scores: Sequence[Mapping[str, float]] | None,
    ) -> None:
        for sample, (one, text) in enumerate(zip(completions, texts, strict=True)):
            line: dict[str, Any] = {"id": row.name, "sample": sample, "prompt": row.prompt, "answer": row.answer}
            line |= {"response": text, "finish_reason": one.finish_reason}
            if scores is not None:
                line["rewards"] = scores[sample]
                line["total"] = total(self.settings.rewards, scores[sample])
            if self.token_ids:
                line |= {"prompt_ids": prompt_ids(self.tokenizer, row), "response_ids": one.tokens.tolist()}
            if self.logprobs:
                line["logprobs"] = [round(float(value), 6) for value in one.logprobs]
            if file is not None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def figures(rewards: Sequence[AnyReward], scores: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Of each reward and of their weighted sum: the mean over prompts of their means (avg@k), its standard error (which
    is that over prompts: the responses to one prompt are not independent), and the mean of the best response."""
    if not scores:
        raise DataError("no prompt is left whose responses all rewards could judge")

    def of(values_PK: np.ndarray) -> dict[str, float]:
        means_P = values_PK.mean(1)
        error = float(means_P.std(ddof=1) / np.sqrt(len(means_P))) if len(means_P) > 1 else float("nan")
        return {"mean": float(means_P.mean()), "error": error, "best": float(values_PK.max(1).mean())}

    each = {
        one.label: {"weight": one.weight} | of(np.asarray([[s[one.label] for s in prompt] for prompt in scores]))
        for one in rewards
    }
    return {"rewards": each, "total": of(np.asarray([[total(rewards, s) for s in prompt] for prompt in scores]))}

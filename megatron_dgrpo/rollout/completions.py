"""vLLM's answer as ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.outputs import RequestOutput

from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.rollout.messages import Completion, GenerateRequest


def completion_of(output: RequestOutput, request: GenerateRequest, sample: int) -> Completion:
    """Of a sample that has ended."""
    (answer,) = output.outputs
    tokens = np.asarray(answer.token_ids, np.int32)
    logprobs: Any = answer.logprobs
    if list(logprobs.token_ids) != tokens.tolist():
        raise RolloutError(
            f"vLLM gave {len(logprobs.token_ids)} log-probs of other tokens than the {len(tokens)} it sampled"
        )
    versions = np.zeros(len(tokens), np.int32)
    for span in answer.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    if answer.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended sample {sample} of prompt {request.prompt_id!r} with {answer.finish_reason!r}")
    return Completion(
        prompt_id=request.prompt_id,
        sample=sample,
        tokens=tokens,
        logprobs=np.asarray(logprobs.logprobs, np.float32),
        finish_reason=answer.finish_reason,
        weight_versions=versions,
        num_cached_tokens=output.num_cached_tokens or 0,
    )

"""What a client and an engine host say to each other. Imports neither torch nor vLLM.

Every message of a client carries a `call`, a number of its choice; whatever answers it repeats the number. A call ends
with `Done`, `Described`, `Failure`, or for `Generate` with the last of its completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from megatron_dgrpo.packing.trajectory import Segment, Trajectory
from megatron_dgrpo.rollout.codec import register


def sample_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The seed of one sample. It depends on what the sample is, not on the order in which samples are asked for."""
    identity = json.dumps([run_seed, step, prompt_id, sample]).encode()
    return int.from_bytes(blake2b(identity, digest_size=8).digest(), "little") >> 1


# ---- the engine ----


@register
@dataclass(frozen=True)
class EngineInfo:
    pid: int
    model_path: str
    architecture: str  # as config.json names it
    vocab_size: int  # sampling is over all of it, ids without a token included
    max_model_len: int
    dtype: str  # "float32", "bfloat16"
    vllm_version: str
    block_size: int  # tokens of a block of the prefix cache
    weight_version: int
    whole: bool  # False from the first byte of an update until it is finished
    shared_memory: str  # see `compatibility.shared_memory`
    num_unfinished: int  # samples that are waiting or being generated
    platform: str = "cpu"  # or "cuda"
    gpus: tuple[str, ...] = ()  # the UUID of each rank's
    can_sleep: bool = False
    sleeping: bool = False  # it has given its GPU's memory back
    quantization: str = ""  # of its weights, in vLLM's words; none: ""


@register
@dataclass(frozen=True)
class Attach:
    """The first message of a client. The host ends when its last owner has gone."""

    call: int
    owner: bool


@register
@dataclass(frozen=True)
class Describe:
    call: int


@register
@dataclass(frozen=True)
class Described:
    call: int
    info: EngineInfo


@register
@dataclass(frozen=True)
class Done:
    call: int


@register
@dataclass(frozen=True)
class Failure:
    """`kind`: request (it cannot be served), not_whole, busy, transfer (an update failed), engine (it is broken)."""

    call: int
    kind: str
    message: str


@register
@dataclass(frozen=True)
class Shutdown:
    call: int


# ---- generation ----


@register
@dataclass(frozen=True)
class Shaping:
    """What changes the distribution that is sampled from, beside the temperature. The defaults change nothing."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@register
@dataclass(frozen=True)
class GenerateRequest:
    """Samples of one prompt: one for each seed. Temperature 0 takes the likeliest token."""

    prompt_id: str
    prompt_tokens: np.ndarray  # int32 [p]
    seeds: tuple[int, ...]
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]  # the only ids that end a response; the engine knows no tokenizer
    shaping: Shaping = Shaping()


@register
@dataclass(frozen=True)
class Completion:
    prompt_id: str
    sample: int  # index into the request's seeds
    tokens: np.ndarray  # int32 [n], the stop token included
    logprobs: np.ndarray  # float32 [n], of the tokens as they were sampled: under the request's temperature (under 1
    # where that is 0) and its shaping, over the ids that this left
    finish_reason: str  # "stop" or "length"
    weight_versions: np.ndarray  # int32 [n], the version that sampled each token
    num_cached_tokens: int  # tokens of the prompt that the prefix cache had


@register
@dataclass(frozen=True)
class Generate:
    call: int
    requests: tuple[GenerateRequest, ...]


@register
@dataclass(frozen=True)
class Completed:
    call: int
    completion: Completion


@register
@dataclass(frozen=True)
class Cancel:
    """Stop generating for a call. There is no answer; what is on its way still arrives."""

    call: int


# ---- scored groups: on their way to the other ranks, and in the journal ----


@register
@dataclass(frozen=True)
class Response:
    """A trajectory without its prompt, which its whole group has in common."""

    sample: int
    seed: int  # that it was drawn with
    segments: tuple[Segment, ...]
    finish_reason: str
    rewards: Mapping[str, float]


@register
@dataclass(frozen=True)
class Group:
    """All samples of a prompt, scored; in the order of their numbers."""

    prompt_id: str
    prompt_tokens: np.ndarray  # int32 [p]
    responses: tuple[Response, ...]
    teacher: str | None = None  # the name of the one that scores it, where the data say so

    @property
    def trajectories(self) -> list[Trajectory]:
        return [
            Trajectory(
                self.prompt_id, r.sample, self.prompt_tokens, r.segments, r.finish_reason, r.rewards, self.teacher
            )
            for r in self.responses
        ]


@register
@dataclass(frozen=True)
class Chunk:
    """Groups that all ranks train on at one time, and whether they are the last ones of their step."""

    groups: tuple[Group, ...]
    last: bool


@register
@dataclass(frozen=True)
class WeightsWanted:
    """Rank 0 to the others, between its trajectories: an engine was started again and needs the current weights."""

    engine: str


# ---- weights ----


@register
@dataclass(frozen=True)
class TensorSpec:
    name: str  # as in the checkpoint
    shape: tuple[int, ...]
    dtype: str


@register
@dataclass(frozen=True)
class BeginUpdate:
    """Announces every tensor of the new version, and where their buckets will lie."""

    call: int
    version: int
    tensors: tuple[TensorSpec, ...]
    path: str  # of the file; what else a source needs, as JSON
    num_bytes: int
    source: str = "file"  # "wire": a file of the host's own, filled by WeightBytes; "ipc", "nccl": memory of GPUs


@register
@dataclass(frozen=True)
class JoinUpdate:
    """Become a member of the NCCL group that the buckets of this update travel in."""

    call: int
    how: str  # JSON


@register
@dataclass(frozen=True)
class WeightBytes:
    """A part of a bucket, which has the same call. Parts come one after another, and are not answered."""

    call: int
    offset: int
    data: np.ndarray  # uint8 [n]


@register
@dataclass(frozen=True)
class LoadBucket:
    """These tensors, or rows of them, lie in the file now. `Done` says that the file's part may be overwritten."""

    call: int
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    checksums: tuple[int, ...]  # one for each name, or none at all
    starts: tuple[int, ...] = ()  # the first row of each, or none at all: whole tensors
    stops: tuple[int, ...] = ()  # the row after the last


@register
@dataclass(frozen=True)
class FinishUpdate:
    call: int
    version: int


@register
@dataclass(frozen=True)
class Sleep:
    """Give all memory of the GPU back; weights are lost."""

    call: int


@register
@dataclass(frozen=True)
class Wake:
    """Take memory for weights again, which an update then fills; or for keys and values, once weights are whole."""

    call: int
    what: str  # "weights" or "kv_cache"


@register
@dataclass(frozen=True)
class AbandonUpdate:
    """Give up a half-done update. The engine refuses to generate until another one is finished."""

    call: int

"""What a run says of its engines: the processes that generate, where they are, how weights reach them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import DType, Frozen


class Engine(Frozen):
    """vLLM engine hosts that serve the same: each is one process around one engine."""

    model: str
    """Name of the model it serves."""
    replicas: PositiveInt = 1
    """Hosts that share the prompts."""
    addresses: tuple[str, ...] = ()
    """Hosts that run already (`dgrpo engine`), instead of any that the run starts: tcp:HOST:PORT or unix:/PATH."""
    key_file: str | None = None
    """File with the key of the hosts at `addresses`, readable by its owner alone."""
    max_restarts: NonNegativeInt = 3
    """How often within an hour a host that died or hung is started again, before its end is that of the run."""
    hang_timeout_s: PositiveFloat = 300.0
    """A host that says nothing for so long, even when asked, hangs. It answers between steps: a step that computes the
    longest prompts must be shorter."""
    placement: Literal["separate", "colocated"] = "separate"
    """On devices or cores of its own, or on the GPUs of the student's ranks: a colocated engine sleeps while the
    student trains, gives its memory back, and gets all weights anew when it wakes."""
    transport: Literal["auto", "shared_memory", "wire", "ipc", "nccl"] = "auto"
    """How weights reach it: through shared memory (on the trainer's machine), over its connection (anywhere), from GPU
    memory that both sides map (colocated), by NCCL (GPUs of its own), or the fastest that both sides can do."""
    dtype: DType | None = None
    """Type of its weights; the model's own where none is given."""
    quantization: Literal["fp8"] | None = None
    """Its linear layers in FP8: weights in blocks of 128 x 128 with a scale each, made by the trainer's ranks with each
    transfer, so that half the bytes travel. Everything else has `dtype`, which is bfloat16 then."""
    max_model_len: PositiveInt
    """Longest prompt plus response, in tokens."""
    kv_cache_bytes: PositiveInt = 2**28
    """Memory for keys and values, on each of its ranks."""
    max_num_seqs: PositiveInt = 256
    """Sequences generated at the same time."""
    prefix_cache: bool = True
    """Compute a prompt once for all of its samples."""
    chunked_prefill: PositiveInt | None = None
    """Compute prompts in pieces, of at most so many tokens a step for all sequences together (none: each prompt in one
    piece, with memory for all of it)."""
    threads: PositiveInt = 1
    """CPU threads of the host, or of each of its ranks, where it runs on CPU."""
    tp: PositiveInt = 1
    """Ranks over which the model is cut, each a process of its own."""
    start_timeout_s: PositiveFloat = 600.0
    """How long the host may take to be ready."""
    request_timeout_s: PositiveFloat = 1800.0
    """How long a batch of requests may take."""
    bucket_bytes: Annotated[int, Field(ge=2**12)] = 2**24
    """Weights arrive in buckets of this size; two are in flight."""
    checksums: bool = False
    """Compare a checksum of every tensor on both sides of each transfer of weights."""

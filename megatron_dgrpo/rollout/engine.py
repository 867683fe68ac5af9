"""vLLM's in-process engine as the host uses it: samples in, completions out, weights replaced between steps.

One vLLM request stands for one sample, with a seed of its own: its tokens then depend on the seed and not on what else
is in the batch, nor on the pieces that its prompt is computed in (`vllm_plugin.py` sees to that on CPU). Samples of one
prompt share its blocks through the prefix cache, even in the step that computes them.

Its log-probs do depend on them in their last bits: other batches round otherwise. A `deterministic` engine gives the
same bits for the same requests at the same weights: its host starts a batch only when the last one has left,
and `start_batch` leaves nothing of that one, neither blocks in the prefix cache nor rows in the model runner.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import vllm
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from megatron_dgrpo.checkpoint.hf.headers import read_headers
from megatron_dgrpo.errors import RolloutError, TransferError
from megatron_dgrpo.rollout import sleeping, vllm_plugin, workers
from megatron_dgrpo.rollout.compatibility import architecture, shared_memory
from megatron_dgrpo.rollout.completions import completion_of
from megatron_dgrpo.rollout.fp8_format import quantisation_config
from megatron_dgrpo.rollout.inbox import Inbox
from megatron_dgrpo.rollout.messages import (
    BeginUpdate,
    Completion,
    EngineInfo,
    GenerateRequest,
    JoinUpdate,
    LoadBucket,
    WeightBytes,
)

_MIN_BATCHED_TOKENS = 8192
"""Prompt tokens computed at a time, unless the context is longer or prompts are computed in pieces."""


class Engine:
    """Nothing may be generated while it is not `whole`."""

    def __init__(
        self,
        *,
        model_path: str,
        dtype: str,
        max_model_len: int,
        kv_cache_bytes: int,
        max_num_seqs: int,
        prefix_cache: bool,
        threads: int,
        tp: int = 1,
        chunked_prefill: int | None = None,
        deterministic: bool = False,
        sleeps: bool = False,
        hf_overrides: dict[str, Any] | None = None,
        quantization: str | None = None,
    ) -> None:
        torch.set_num_threads(threads)  # vLLM's CPU worker makes this call a no-op from there on
        if current_platform.is_cpu():
            # One function of vLLM's sampler is compiled when it is first called, even with enforce_eager: 20 s of C++
            # compilation on a machine that has not done it before, 5 s on others, for a comparison and a sum.
            torch.compiler.set_stance("force_eager")
        vllm_plugin.register()  # vLLM does it, too, where the package's entry points are installed
        quantised = {"quantization_config": quantisation_config(list(read_headers(model_path)))} if quantization else {}
        self.llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=model_path,
                skip_tokenizer_init=True,
                generation_config="vllm",  # sampling is what a request says, and nothing that lies in the folder
                dtype=dtype,  # type: ignore[arg-type]
                hf_overrides={**(hf_overrides or {}), **quantised},  # in place of what config.json says
                load_format="dummy" if quantised else "auto",  # a folder has no FP8 weights: the trainer sends them
                seed=0,  # of nothing that is used: every sample has its own
                tensor_parallel_size=tp,
                distributed_executor_backend=workers.HostExecutor if tp > 1 else "uni",
                max_model_len=max_model_len,
                kv_cache_memory_bytes=kv_cache_bytes,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=prefix_cache,
                enable_chunked_prefill=chunked_prefill is not None,
                max_num_batched_tokens=chunked_prefill or max(max_model_len, max_num_seqs, _MIN_BATCHED_TOKENS),
                logprobs_mode="processed_logprobs",
                enforce_eager=current_platform.is_cpu(),
                weight_transfer_config=WeightTransferConfig(backend=vllm_plugin.BACKEND),
                disable_log_stats=True,
                enable_sleep_mode=sleeps,
            )
        )
        self.model_config = self.llm.vllm_config.model_config
        assert self.model_config.logprobs_mode == "processed_logprobs", "log-probs would not be those of the sampling"
        self.deterministic = deterministic
        self.vocab_size = self.model_config.get_vocab_size()
        self.weight_version = 0
        self._mixed = bool(quantised)  # weights of two versions, or of none; or blocks of the prefix cache of others
        self._updating = False
        self._inbox: Inbox | None = None
        self._asleep: set[str] = set()  # what of the engine has no memory
        self._gpus = sleeping.gpus(self.llm)
        self._unfinished: dict[str, tuple[GenerateRequest, int]] = {}
        self.llm.set_weight_version("0")
        self._warm_up()

    def info(self) -> EngineInfo:
        return EngineInfo(
            pid=os.getpid(),
            model_path=str(self.model_config.model),
            architecture=architecture(str(self.model_config.model)),
            vocab_size=self.vocab_size,
            max_model_len=self.model_config.max_model_len,
            dtype=str(self.model_config.dtype).removeprefix("torch."),
            quantization=str(self.model_config.quantization or ""),
            vllm_version=vllm.__version__,
            block_size=self.llm.vllm_config.cache_config.block_size,
            weight_version=self.weight_version,
            whole=self.whole,
            shared_memory=shared_memory(),
            num_unfinished=self.num_unfinished,
            platform=current_platform.device_type,
            gpus=self._gpus,
            can_sleep=self.model_config.enable_sleep_mode,
            sleeping=bool(self._asleep),
        )

    # ---- generation ----

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def problems(self, request: GenerateRequest) -> list[str]:
        """Why a request cannot be served; none if it can."""
        problems = []
        prompt, length = request.prompt_tokens, self.model_config.max_model_len
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            return ["its prompt is not a row of token ids"]
        if len(prompt) == 0:
            problems.append("its prompt is empty")
        outside = {int(t) for t in prompt if not 0 <= t < self.vocab_size}
        outside |= {t for t in request.stop_token_ids if not 0 <= t < self.vocab_size}
        if outside:
            problems.append(f"ids {sorted(outside)[:5]} are outside of the vocabulary of {self.vocab_size}")
        if request.max_tokens < 1:
            problems.append("it asks for no token")
        elif len(prompt) + request.max_tokens > length:
            problems.append(
                f"{len(prompt)} prompt tokens and {request.max_tokens} new ones are more than the engine's context "
                f"of {length}: shorten them or raise max_model_len"
            )
        if not request.seeds:
            problems.append("it asks for no sample")
        if any(not 0 <= seed < 2**63 for seed in request.seeds):
            problems.append("its seeds are not between 0 and 2**63")
        if not 0 <= request.temperature <= 2:
            problems.append(f"its temperature is {request.temperature}; vLLM takes 0 (greedy) to 2")
        elif 0 < request.temperature < 0.01:
            problems.append(f"its temperature {request.temperature} is below 0.01, which vLLM replaces: greedy is 0")
        return problems

    def start_batch(self) -> None:
        """What follows depends on nothing that was before, where the engine is deterministic; it has nothing to do."""
        if self.deterministic:
            assert not self._unfinished
            self.llm.step()  # tells the model runner of samples that have gone
            self._reset_prefix_cache()

    def add(self, sample_id: str, request: GenerateRequest, sample: int) -> None:
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seeds[sample] if request.temperature > 0 else None,
            stop_token_ids=list(request.stop_token_ids),
            **vars(request.shaping),
            ignore_eos=True,  # only the request's own stop ids count
            logprobs=0,  # of the sampled token
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.llm.add_request(sample_id, tokens_input(request.prompt_tokens.tolist()), params)
        self._unfinished[sample_id] = request, sample

    def abort(self, sample_ids: Sequence[str]) -> None:
        self.llm.abort_request(list(sample_ids))
        for sample_id in sample_ids:
            del self._unfinished[sample_id]

    def step(self) -> list[tuple[str, Completion]]:
        """One forward pass; the samples that ended with it."""
        ended = []
        for output in self.llm.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                request, sample = self._unfinished.pop(output.request_id)
                ended.append((output.request_id, completion_of(output, request, sample)))
        return ended

    def _warm_up(self) -> None:
        """The first generation takes seconds. Its blocks must not stay in the prefix cache."""
        request = GenerateRequest("warm-up", np.zeros(1, np.int32), (0,), 2, 1.0, ())
        self.add("warm-up", request, 0)
        while self.num_unfinished:
            self.step()
        self._reset_prefix_cache()

    # ---- weights ----

    @property
    def whole(self) -> bool:
        """Whether every weight is of `weight_version`, and no update is under way that could change that."""
        return not (self._mixed or self._updating or self._asleep)

    def begin_update(self, message: BeginUpdate) -> None:
        """Check the manifest, and change nothing yet: an update that is given up now leaves the engine as it was."""
        if self.num_unfinished:
            raise RolloutError(
                f"{self.num_unfinished} samples are unfinished: wait for them or cancel them before an update"
            )
        self.abandon_update()
        if "weights" in self._asleep:
            raise TransferError("The engine sleeps, and has no memory for weights: wake it before an update")
        inbox = Inbox(message) if message.source == "wire" else None
        init_info = {
            "path": inbox.path if inbox else message.path,
            "num_bytes": message.num_bytes,
            "names": [t.name for t in message.tensors],
            "shapes": [list(t.shape) for t in message.tensors],
            "dtypes": [t.dtype for t in message.tensors],
            "source": "inbox" if inbox else message.source,
        }
        try:
            workers.ask(self.llm, "init_weight_transfer_engine", init_info=init_info)
        finally:
            if inbox:
                inbox.close()
        workers.ask(self.llm, "start_weight_update")
        self._updating, self._inbox = True, inbox

    def join_update(self, message: JoinUpdate) -> None:
        self._in_update()
        self._load({"join": message.how})

    def take_bytes(self, message: WeightBytes) -> None:
        if not self._updating:
            return  # of an update that has failed: the bucket that follows is refused
        if self._inbox is None:
            raise TransferError("Weights came over the connection, and this update's lie elsewhere")
        self._mixed = True  # a client that stops here has begun
        try:
            self._inbox.put(message)
        except TransferError:
            self.abandon_update()
            raise

    def load_bucket(self, message: LoadBucket) -> None:
        self._in_update()
        update_info = {
            "names": list(message.names),
            "offsets": list(message.offsets),
            "checksums": list(message.checksums),
            "rows": list(zip(message.starts, message.stops, strict=True)),
        }
        self._mixed = True
        self._load(update_info, message)

    def _load(self, update_info: dict[str, Any], bucket: LoadBucket | None = None) -> None:
        try:
            if self._inbox is not None and bucket is not None:
                self._inbox.check(bucket)
            workers.ask(self.llm, "update_weights", update_info=update_info)
        except TransferError:
            self.abandon_update()  # vLLM has ended it only in those workers that failed
            raise

    def finish_update(self, version: int) -> None:
        self._in_update()
        try:
            workers.ask(self.llm, "finish_weight_update")
        except Exception:
            self.abandon_update()
            raise
        self._updating, self._inbox = False, None
        self._reset_prefix_cache()
        self.llm.set_weight_version(str(version))
        self.weight_version, self._mixed = version, False

    def abandon_update(self) -> None:
        """End an update that is under way, if one is. If it has loaded anything, another makes the engine whole."""
        if self._updating:
            self._updating, self._inbox = False, None
            with contextlib.suppress(TransferError):  # failing is how it is done
                workers.ask(self.llm, "update_weights", update_info={"abandon": True})

    def sleep(self) -> None:
        """Give the GPU's memory back. Weights and prefix cache are lost, so an update has to follow."""
        if self.num_unfinished:
            raise RolloutError(f"{self.num_unfinished} samples are unfinished: wait for them or cancel them")
        self.abandon_update()
        if not self._asleep:
            self._mixed = True
            sleeping.sleep(self.llm)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, what: str) -> None:
        if what in self._asleep:
            sleeping.wake(self.llm, what)
            self._asleep.discard(what)

    def _in_update(self) -> None:
        if not self._updating:
            raise TransferError("No update is under way: it was not begun, or it failed; begin it again")

    def _reset_prefix_cache(self) -> None:
        """Blocks of other weights must never be found again. vLLM does nothing while a request runs, and says so."""
        if not self.llm.reset_prefix_cache():
            raise TransferError("The prefix cache could not be reset: a request still holds blocks of it")

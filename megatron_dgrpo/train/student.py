"""The model that is trained: decoder, Megatron's data-parallel wrappers with their gradient buffers, its optimizer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_dgrpo.checkpoint.hf.families import read_spec
from megatron_dgrpo.checkpoint.hf.importer import import_weights
from megatron_dgrpo.config.optimizer import Adam, rate
from megatron_dgrpo.config.schema import RopeScaling
from megatron_dgrpo.errors import NonFiniteError
from megatron_dgrpo.model.decoder import Decoder, build_decoder
from megatron_dgrpo.model.megatron_config import BuildOptions
from megatron_dgrpo.observe.progress import Board
from megatron_dgrpo.parallel.groups import Groups
from megatron_dgrpo.train import adam
from megatron_dgrpo.train.optimizer_memory import memory_options

adam.install()


class Student:
    """A decoder in training. Its optimizer is made anew for each stage."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.config.finalize_model_grads_func is None  # `reduce_gradients` does it, once an update
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=decoder.config.params_dtype == torch.bfloat16
        )
        self.decoder = decoder
        self.wrapped = [
            DistributedDataParallel(
                decoder.config, ddp, part, disable_bucketing=number > 0, pg_collection=decoder.groups.collection
            )
            for number, part in enumerate(decoder.parts)
        ]
        self._settings: Adam | None = None
        self._optimizer: MegatronOptimizer | None = None
        self._updates = self._num_updates = self._made = 0

    def start_optimizer(self, settings: Adam, num_updates: int = 0) -> None:
        """For so many updates, over which the learning rate follows its schedule."""
        dtype = self.decoder.config.params_dtype
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            **memory_options(settings),
        )
        groups = self.decoder.groups
        with groups.as_default():  # it gathers the names of parameter groups
            self._optimizer = get_megatron_optimizer(
                config, self.wrapped, use_gloo_process_groups=False, pg_collection=groups.collection
            )
        self._settings, self._updates, self._num_updates, self._made = settings, 0, num_updates, 0

    @property
    def optimizer(self) -> MegatronOptimizer:
        assert self._optimizer is not None, "start_optimizer comes first"
        return self._optimizer

    @property
    def updates(self) -> int:
        """Of this stage, those that were skipped included: the learning rate follows them."""
        return self._updates

    @property
    def made(self) -> int:
        """Updates of this stage that were not skipped: without one the optimizer has no state."""
        return self._made

    def resume(self, updates: int, made: int) -> None:
        """The weights, and the optimizer's state where updates were made, came from a checkpoint."""
        self._updates, self._made = updates, made
        if not made:
            self.optimizer.reload_model_params()  # master weights were made of what the model held before

    def zero_grad(self) -> None:
        for part in self.wrapped:
            part.zero_grad_buffer()
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def reduce_gradients(self, scale: float = 1.0) -> None:
        """Over ranks, once an update: the sums replace what was added up, so that a second call would count twice."""
        finalize_model_grads(self.wrapped, None, pg_collection=self.decoder.groups.collection)
        if scale != 1.0:
            for part in self.wrapped:
                part.scale_gradients(scale)

    def update(self) -> dict[str, float]:
        """One optimizer update from the gradients in the buffers. Nothing is changed when they are not finite."""
        assert self._settings is not None
        lr = rate(self._settings, self._updates + 1, self._num_updates)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient's norm is {norm} at update {self._updates + 1} of this stage (learning rate {lr:g})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]  # 0 for norms and biases
        self.optimizer.step()
        self._updates += 1
        self._made += 1
        return {"grad_norm": norm, "lr": lr}

    def skip(self) -> None:
        """Leave an update out: the learning rate's schedule goes on, all else is as it was."""
        self._updates += 1

    def bad_gradients(self, limit: int = 4) -> list[str]:
        """Parameters whose gradient is not finite in this rank's buffers: its own part of the sum, and what it alone
        contributed elsewhere."""
        named = (item for part in self.wrapped for item in part.named_parameters())
        bad = [name for name, p in named if hasattr(p, "main_grad") and not bool(torch.isfinite(p.main_grad).all())]
        return bad[:limit] + ([f"and {len(bad) - limit} more"] if len(bad) > limit else [])


def load_student(
    folder: str | Path,
    *,
    groups: Groups,
    options: BuildOptions,
    rope: RopeScaling | None = None,
    board: Board | None = None,
) -> Student:
    decoder = build_decoder(read_spec(folder, rope), groups=groups, options=options)
    with (board or Board()).task("load the student", sum(p.nbytes for p in decoder.parameters()), "bytes") as task:
        import_weights(decoder, folder, advance=task.advance)
    return Student(decoder)

"""The Triton kernels, without a device: in Triton's interpreter against PyTorch, and compiled for CUDA.

The interpreter is chosen by an environment variable when the kernels are imported, so these run in processes of their
own. That the kernels are right on a device is for tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def in_process(what: str, tmp_path, **env: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path), **env}
    done = subprocess.run(
        [sys.executable, __file__, what], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_equal_pytorch(tmp_path) -> None:
    assert "statistics 18 gradients 20 whole 3" in in_process("interpret", tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_cuda(tmp_path) -> None:
    assert "compiled 2" in in_process("compile", tmp_path)


def interpret_statistics() -> int:
    from megatron_dgrpo.heads import kernels, running
    from megatron_dgrpo.heads.running import Running

    checked = 0
    student, teacher = {"m", "S", "U"}, {"n", "St"}
    for rows, columns in ((5, 37), (3, 4097)):
        for names in (student, teacher, {"m", "S"}, student | teacher | {"D", "F"}, {"m", "S", "D"} | teacher):
            ours, theirs = (Running(names, rows, torch.float32, torch.device("cpu")) for _ in range(2))
            for tile in range(2):
                a, b = (torch.randn(rows, columns + 3)[:, :columns] * 5 + tile for _ in range(2))
                a, b = a if "m" in names else None, b if "n" in names else None
                running.add_tile(theirs.rows(0, rows), a, b, (torch.empty(rows, columns), torch.empty(rows, columns)))
                kernels.add_tile(ours.rows(0, rows), a, b)
                torch.testing.assert_close(ours.max_KT, theirs.max_KT)
                torch.testing.assert_close(ours.sum_KT, theirs.sum_KT, rtol=2e-6, atol=2e-5)
                checked += 1
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
    state = Running({"m", "S"}, 2, torch.float32, torch.device("cpu"))
    kernels.add_tile(state.rows(0, 2), bad, None)
    assert not torch.isfinite(state["S"]).any()
    return checked - 2


def interpret_gradients() -> int:
    from megatron_dgrpo.heads import kernels, logit_gradient
    from megatron_dgrpo.heads.logit_gradient import Entries, Slopes

    checked = 0
    for rows, columns in ((5, 37), (3, 4097)):
        for by_logit, by_gap, by_teacher in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1), (0, 0, 1)):
            a, b = (torch.randn(rows, columns + 3)[:, :columns] for _ in range(2))
            number = lambda on=True, rows=rows: torch.randn(rows) if on else None  # noqa: E731
            norm, teacher_lse = torch.logsumexp(a, 1), torch.logsumexp(b, 1)
            slopes = Slopes(
                norm, torch.randn(rows), number(by_logit), number(by_gap), number(by_teacher), None, teacher_lse
            )
            target = Entries(torch.randint(-9, columns + 9, (rows, 1)), torch.randn(rows, 1))
            scratch = (torch.empty(rows, columns), torch.empty(rows, columns))
            reference = logit_gradient.tile_gradient(a.clone(), b.clone(), slopes, scratch)
            target.add_to(reference)
            for dtype, rtol in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
                out = kernels.tile_gradient(a.clone(), b if slopes.needs_teacher else None, slopes, target, dtype)
                assert out.dtype == dtype
                torch.testing.assert_close(out.float(), reference, rtol=rtol, atol=1e-6)
                checked += 1
    return checked


def interpret_whole() -> int:
    """Through `row_statistics`: the dispatch, and top-k and JSD beside the kernels."""
    from megatron_dgrpo.heads import HeadShard, elementwise, row_statistics

    checked = 0
    for names in (("logprob", "entropy", "kl", "forward_kl"), ("kl", "kl_topk_student_tail"), ("kl", "jsd")):
        results = []
        for by_kernel in (False, True):
            elementwise._by_kernel = lambda x, by_kernel=by_kernel: by_kernel  # type: ignore[assignment]
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(9, 8, generator=generator, requires_grad=True)
            weight = torch.randn(50, 8, generator=generator, requires_grad=True)
            teacher, teacher_weight = torch.randn(9, 6, generator=generator), torch.randn(44, 6, generator=generator)
            out = row_statistics(
                hidden,
                HeadShard(weight, 0, 50),
                torch.arange(9) * 5,
                temperature=0.7,
                group=None,
                teacher_hidden_TH=teacher,
                teacher_head=HeadShard(teacher_weight, 0, 44),
                want=names,
                topk=4,
                chunk_rows=5,
                tile=16,
            )
            sum((getattr(out, f"{n}_T") * torch.arange(1.0, 10.0)).sum() for n in names).backward()
            results.append([*(getattr(out, f"{n}_T").detach() for n in names), hidden.grad, weight.grad])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        checked += 1
    return checked


def compile_for_cuda() -> int:
    """To machine code of an H100/H200, with everything switched on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_dgrpo.heads import kernels

    compiled = 0
    for kernel in (kernels._add_tile_kernel, kernels._tile_gradient_kernel):
        special = {"place_ptr": "*i64", "out_ptr": "*bf16"}
        signature, constants = {}, {}
        for name in kernel.arg_names:
            if name.isupper():
                signature[name], constants[name] = "constexpr", 2048 if name == "BLOCK" else True
            else:
                signature[name] = special.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        source = ASTSource(
            fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()}
        )
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert len(done.asm["cubin"]) > 0
        compiled += 1
    return compiled


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "compile":
        print("compiled", compile_for_cuda())
    else:
        print("statistics", interpret_statistics(), "gradients", interpret_gradients(), "whole", interpret_whole())

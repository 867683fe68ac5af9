"""The head's gradient in Megatron's buffers: main_grad, its hooks, overlapped reduction, tied embeddings."""

from __future__ import annotations

import pytest
import torch

from megatron_dgrpo.heads import HeadShard, row_statistics, row_statistics_with_gradients
from megatron_dgrpo.testing import run_distributed

VOCABULARY, PADDED, SIZE, ROWS, MICRO_BATCHES = 37, 40, 8, 6, 2


def data(rank: int, micro_batch: int):
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    ids = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return ids, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def parameters():
    generator = torch.Generator().manual_seed(99)
    return (torch.randn(PADDED, SIZE, generator=generator) for _ in range(2))


def expected(ranks: int, tied: bool, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over ranks and micro-batches, by plain autograd."""
    embedding, output = (x.clone().requires_grad_() for x in parameters())
    head = embedding if tied else output
    for rank in range(ranks):
        for micro_batch in range(MICRO_BATCHES):
            ids, targets = (x[:rows] for x in data(rank, micro_batch))
            logp = torch.log_softmax(embedding[ids].tanh() @ head[:VOCABULARY].T, -1)
            logp.gather(1, targets[:, None]).sum().backward()
    zeros = torch.zeros(PADDED, SIZE)
    return embedding.grad if embedding.grad is not None else zeros, head.grad if head.grad is not None else zeros


def under_megatron(rank: int, ranks: int, tied: bool, overlap: bool, mode: str, rows: int):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dgrpo.parallel.groups import Groups

    groups = Groups(tp=1, dp=ranks)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            embedding, output = parameters()
            self.embedding = torch.nn.Parameter(embedding)
            self.output = self.embedding if tied else torch.nn.Parameter(output)
            if tied:  # as Megatron's language models do
                self.embedding.zero_out_wgrad = True

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embedding[ids].tanh()

    config = TransformerConfig(num_layers=1, hidden_size=SIZE, num_attention_heads=1, calculate_per_token_loss=True)
    ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap, use_distributed_optimizer=False, bucket_size=1)
    model = Model()
    wrapped = DistributedDataParallel(config, ddp, model, pg_collection=groups.collection)
    wrapped.zero_grad_buffer()
    for micro_batch in range(MICRO_BATCHES):
        ids, targets = (x[:rows] for x in data(rank, micro_batch))
        last = micro_batch == MICRO_BATCHES - 1
        kwargs = dict(temperature=1.0, group=None, want=[], chunk_rows=4, tile=16)
        head = HeadShard(model.output, 0, VOCABULARY)
        with torch.enable_grad() if last else wrapped.no_sync():
            if mode == "recompute":
                row_statistics(wrapped(ids), head, targets, **kwargs).logprob_T.sum().backward()
            else:
                ones = lambda part, at: {"logprob": torch.ones_like(part.logprob_T)}  # noqa: E731
                row_statistics_with_gradients(wrapped(ids), head, targets, coefficients=ones, **kwargs)[1].backward()
        assert model.output.grad is None and model.embedding.grad is None
    wrapped.finish_grad_sync()
    return model.embedding.main_grad.clone(), model.output.main_grad.clone(), model.output.grad_added_to_main_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_gradients_in_megatrons_buffers(tied: bool, overlap: bool, mode: str) -> None:
    embedding, output = expected(2, tied, ROWS)
    for own_embedding, own_output, added in run_distributed(under_megatron, 2, tied, overlap, mode, ROWS):
        assert added
        torch.testing.assert_close(own_embedding, embedding, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own_output, output, rtol=1e-5, atol=1e-6)
        assert not own_output[VOCABULARY:].any()


def test_a_micro_batch_without_rows_keeps_the_reduction_going() -> None:
    for tied in (False, True):
        for own_embedding, own_output, _ in run_distributed(under_megatron, 2, tied, True, "recompute", 0):
            assert not own_embedding.any() and not own_output.any()


@pytest.mark.parametrize("mode", ["recompute", "in forward"])
def test_main_grad_of_another_type_is_added_to_once(mode: str) -> None:
    """bfloat16 buffers: chunks are summed in float32 and rounded once, not chunk by chunk."""
    hidden = torch.ones(512, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(2, 4, dtype=torch.bfloat16)
    targets = torch.zeros(512, dtype=torch.int64)
    kwargs = dict(temperature=1.0, group=None, want=[], chunk_rows=1)
    if mode == "recompute":
        row_statistics(hidden, HeadShard(weight, 0, 2), targets, **kwargs).logprob_T.sum().backward()
    else:
        ones = lambda part, at: {"logprob": torch.ones_like(part.logprob_T)}  # noqa: E731
        row_statistics_with_gradients(hidden, HeadShard(weight, 0, 2), targets, coefficients=ones, **kwargs)[
            1
        ].backward()
    assert weight.main_grad[0].tolist() == [256.0] * 4 and weight.grad is None


def test_a_frozen_head_gets_nothing() -> None:
    hidden = torch.ones(3, 4, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(5, 4), requires_grad=False)
    weight.main_grad = torch.zeros(5, 4)
    row_statistics(
        hidden, HeadShard(weight, 0, 5), torch.zeros(3, dtype=torch.int64), temperature=1.0, group=None, want=[]
    ).logprob_T.sum().backward()
    assert hidden.grad.any() and weight.grad is None and not weight.main_grad.any()

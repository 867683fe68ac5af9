"""The layout record: everything about a micro-batch that is not a weight, listed explicitly.

Legend: _S tokens of the micro-batch on this rank, _R loss rows of the micro-batch.

There is no label shift anywhere. A loss row says: the hidden state at `row_hidden_R[i]` predicts the token
`row_target_R[i]`, and what the algorithm knows about it (advantage, old log-prob, weights) is found at
`row_stream_R[i]` of the streams. Attention is told by `documents` which tokens see each other, and rotary embeddings by
`positions_S` where a token stands in its document, so tokens may lie in any order on any rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Document:
    """A run of consecutive tokens of the micro-batch that attend causally to one another and to nothing else."""

    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    tokens_S: np.ndarray  # int64 [s]
    positions_S: np.ndarray  # int64 [s]
    documents: tuple[Document, ...]  # in order, covering [0, s); the last one may be padding
    num_padding: int  # tokens at the end that pad s to the unit that the model's layout needs
    row_hidden_R: np.ndarray  # int64 [r] index into [0, s)
    row_target_R: np.ndarray  # int64 [r]
    row_stream_R: np.ndarray  # int64 [r] index into the streams

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_S)

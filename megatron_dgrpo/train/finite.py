"""What is not finite ends the run before it changes a weight, and says where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dgrpo.errors import NonFiniteError


@contextmanager
def finite(kind: str, stage: int, step: int, update: int = 1) -> Iterator[None]:
    """Every rank finds the same in the same reduction, and all of them end here."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"stage {stage} ({kind}), step {step}, update {update}: {error}") from None

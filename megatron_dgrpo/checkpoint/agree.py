"""What fails on one rank fails on all of them.

A rank that raises while the others walk into the next collective leaves them waiting for it. So work that may fail is
done under `agreed`, holds no collective of its own, and ends with one that tells every rank of every failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_dgrpo.errors import ConversionError, listing


@contextmanager
def agreed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise on every rank of `group` (None: the world) if the body raised on any: its own
    error where it did, a summary elsewhere."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said: list[str | None] = [None] * dist.get_world_size(group)
    if len(said) > 1:
        dist.all_gather_object(said, None if failure is None else str(failure) or repr(failure), group=group)
    if failure is not None:
        raise failure
    if any(said):
        # the same words of many ranks are said once
        words = dict.fromkeys(word for word in said if word)
        title = f"{sum(word is not None for word in said)} of {len(said)} ranks failed, all stopped:"
        raise ConversionError(listing(title, words))

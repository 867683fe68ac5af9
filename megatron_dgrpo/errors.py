"""Errors that a user can act on. One base class; each domain's class is also the standard type it resembles.

Every message names the cause and the remedy. Where several problems can be listed at once, they are: `listing` makes
one message of them.
"""

from __future__ import annotations

from collections.abc import Iterable


class DGRPOError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DGRPOError, ValueError):
    """A setting is unknown, wrong, or contradicts another."""


class LayoutError(DGRPOError, ValueError):
    """A parallel layout does not fit the model, the data or the machine."""


class ConversionError(DGRPOError, ValueError):
    """A checkpoint's files, names, shapes or types are not what the model needs."""


class CheckpointError(DGRPOError, ValueError):
    """A training checkpoint is damaged, half there, or of another run."""


class DataError(DGRPOError, ValueError):
    """A row, a sample or a sequence cannot be used."""


class UnreachableError(DataError):
    """A dataset of the hub cannot be reached from here."""


class ObjectiveError(DGRPOError, ValueError):
    """The inputs of the objective are not ones it is defined for."""


class RewardError(DGRPOError, RuntimeError):
    """A reward could not be computed."""


class RolloutError(DGRPOError, RuntimeError):
    """An engine could not generate, or answered something else than was asked."""


class TransferError(DGRPOError, RuntimeError):
    """Weights could not be moved, or the two sides disagree about them."""


class LaunchError(DGRPOError, RuntimeError):
    """A process could not be started, or ended when it should not have."""


class MismatchError(DGRPOError, RuntimeError):
    """The trainer and the engine disagree about the same tokens by more than the config allows."""


class CapacityError(DGRPOError, MemoryError):
    """A batch that the settings allow does not fit into memory."""


class NonFiniteError(DGRPOError, ArithmeticError):
    """A loss, gradient or hidden state is NaN or infinite."""


def listing(title: str, problems: Iterable[str]) -> str:
    """One message out of a title and its problems, a line each."""
    return "\n".join([title, *(f"  - {problem}" for problem in problems)])

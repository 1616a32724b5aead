"""Errors meant for people: one line that says what is wrong, and a hint that says what to do.

The command line prints ``message`` and ``hint`` and exits with ``exit_code``; it shows a trace only with ``--debug``.
"""

from __future__ import annotations

from typing import ClassVar


class MoesaicError(Exception):
    """Base of every error that moesaic raises on purpose.

    Args:
        message: What is wrong, naming the file, tensor or option. One line.
        hint: What the user can do about it. One line, may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InputError(MoesaicError):
    """A path, option or text that cannot be used."""


class UnsupportedModelError(InputError):
    """A model that is intact but that moesaic does not convert (family, quantised, encoder-only, already MoE)."""


class CheckpointError(InputError):
    """A checkpoint that is damaged or unsafe (truncated shard, NaN weights, pickle, path traversal)."""


class VerificationError(MoesaicError):
    """An output that does not compute what it should, or whose files are not those that were written."""

    exit_code = 3


class UnfinishedCheckError(VerificationError):
    """A check that came to no end, as its process was killed or too slow: the same one may pass another time."""


class ResourceError(MoesaicError):
    """Not enough disk or memory for the job."""

    exit_code = 4

"""Progress of long work, as the library reports it; the command line draws it (:mod:`moesaic.cli.console`)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the steps of one long job. Implementations must be cheap: they are called once per layer or window."""

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` equal steps begins."""

    def advance(self, detail: str = "") -> None:
        """One step of the phase is done."""

    def note(self, text: str) -> None:
        """Something the user should know, not an error."""


class Silent:
    """Reports nothing; the default in Python."""

    def start(self, label: str, total: int) -> None:
        """Ignored."""

    def advance(self, detail: str = "") -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

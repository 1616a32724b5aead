"""Talking to people: prose and progress on stderr, results on stdout; plain lines when stderr is no terminal."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from moesaic.cli.pulse import PULSE
from moesaic.train.launch import is_worker


def quiet_libraries(quiet: bool = False) -> None:
    """No bars, advice or warnings of libraries between our lines. Imports transformers: for verbs that need it.

    That takes seconds, so it is said on a terminal, unless ``quiet``.
    """
    if not quiet and not is_worker():
        PULSE.watch("loading torch and transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.warnoptions:  # python -W shows them
        warnings.simplefilter("ignore")


def say(text: str = "") -> None:
    """One line of prose on stderr."""
    PULSE.hush()
    print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """One line of result on stdout."""
    PULSE.hush()
    print(text, flush=True)


def emit_json(data: Any) -> None:
    """A result as JSON on stdout."""
    emit(json.dumps(data, indent=2, sort_keys=False))


def fail(message: str, hint: str, code: int) -> NoReturn:
    """The one way to end with an error: a line, a hint, an exit code."""
    say(f"error: {' '.join(message.split())}")
    if hint:
        say(f"hint: {' '.join(hint.split())}")
    sys.exit(code)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A plain text table; ``align`` has < or > for each column, by default the first one is left-aligned alone."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    align = align or "<".ljust(len(headers), ">")

    def line(cells: Sequence[str]) -> str:
        padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, align, widths, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def parity_lines(parity: Mapping[str, Any], *, whole: bool) -> Iterator[str]:
    """What was found beside the dense model, by the keys ``all_on`` and ``oracle``.

    ``whole``: the logits were compared, not the outputs of some layers.
    """
    if parity["all_on"] is not None:
        what = "logit difference" if whole else "difference of FFN outputs"
        yield f"all experts on against dense: relative {what} {parity['all_on']:.1e}"
    if parity["oracle"] is not None:
        yield f"written FFNs against the blueprint's oracle: relative difference {parity['oracle']:.1e}"


def native_line(parity: Mapping[str, Any]) -> str:
    """A ``native_parity`` entry of results.json as one line."""
    return (
        f"stock transformers against the blueprint, {parity['tokens']} tokens: median logit difference "
        f"{parity['median']:.1e}, relative; same next token {parity['top1']:.2%}; mean KL {parity['mean_kl']:.1e}"
    )


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def rough(seconds: float) -> str:
    """A forecast for people: ``40 s``, ``3 min``, ``2.5 hours``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


WORKING = "working"
_STEPS_BEFORE_ETA = 3
"""The first step warms up: kernels are compiled, weights read. So an ETA needs two more."""


class ConsoleProgress:
    """Progress with ETA: one line rewritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._label, self._total, self._done, self._shown = "", 0, 0, ""
        self._started = self._first = self._last = 0.0

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` steps begins."""
        self._label, self._total, self._done = label, total, 0
        self._started = self._first = self._last = time.monotonic()
        if total and not self._quiet:
            self._show(f"{label}  0/{total}", end="")
            PULSE.watch(f"{label}  0/{total}")

    def advance(self, detail: str = "") -> None:
        """One step is done."""
        self._done += 1
        now = time.monotonic()
        if self._done == 1:
            self._first = now
        last_step = self._done == self._total
        if self._quiet or (not self._terminal and not last_step and now - self._last < 10):
            return
        self._last = now
        text = f"{self._label}  {self._done}/{self._total}  {duration(now - self._started)} spent"
        if (left := self._left(now)) is not None:
            text = f"{text}, {duration(left)} left"
        text = f"{text}  {detail}".rstrip()
        self._show(text, end="\n" if last_step else "")
        PULSE.watch(WORKING if last_step else text)

    def _left(self, now: float) -> float | None:
        """Seconds to go, from the mean of the steps after the first; None while too few of those are known."""
        if self._done < _STEPS_BEFORE_ETA or self._done == self._total:
            return None
        return (now - self._first) / (self._done - 1) * (self._total - self._done)

    def _show(self, text: str, end: str) -> None:
        PULSE.hush()
        self._shown = text
        if self._terminal:
            print(f"\r\x1b[2K{text}", end=end, file=sys.stderr, flush=True)
        else:
            say(text)

    def note(self, text: str) -> None:
        """A remark on a line of its own."""
        if not self._quiet:
            if self._terminal and self._done < self._total:
                self._show(self._shown, end="\n")
            say(text)
            PULSE.watch(WORKING)

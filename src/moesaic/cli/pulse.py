"""A sign of life on a terminal: while nothing is said, a line tells what is going on, and for how long.

The line is wiped before anything else is printed. Where stderr is no terminal, nothing of this is seen.
"""

from __future__ import annotations

import sys
import threading
import time

_SILENCE = 1.0
"""Seconds after which it shows, and between two of its lines."""


class Pulse:
    """One thread for the whole command; it starts with the first :meth:`watch`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = ""
        self._since = 0.0
        self._painted = False
        self._thread: threading.Thread | None = None

    def watch(self, text: str) -> None:
        """From now on ``text`` is what is going on. Does nothing where stderr is no terminal."""
        if not sys.stderr.isatty():
            return
        with self._lock:
            self._wipe()
            self._text, self._since = text, time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
            self._thread.start()

    def hush(self) -> None:
        """Something else is printed now; nothing is shown until the next :meth:`watch`."""
        with self._lock:
            self._wipe()
            self._text = ""

    def _wipe(self) -> None:
        if self._painted:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._painted = False

    def _beat(self) -> None:
        while True:
            time.sleep(_SILENCE)
            with self._lock:
                if self._text:
                    seconds = time.monotonic() - self._since
                    print(f"\r\x1b[2K{self._text}  ({seconds:.0f} s)", end="", file=sys.stderr, flush=True)
                    self._painted = True


PULSE = Pulse()

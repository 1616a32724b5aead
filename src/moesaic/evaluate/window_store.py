"""What was measured of each window, kept in the cache: an evaluation that was stopped goes on, and the dense model is
measured once under each protocol.

One file of lines per model and protocol. Windows do not overlap and are taken from the start of a text, so those of a
short run are the first ones of a longer run.

Axis: W tokens per window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import moesaic
from moesaic.durable import append_line
from moesaic.errors import ResourceError
from moesaic.paths import cache_folder

_FOLDER = "evaluations"


@dataclass(frozen=True)
class WindowResult:
    """One window: summed negative log-likelihood in nats, and by FFN the neurons used by the tokens seen, together."""

    nll: float
    neurons: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


class WindowStore:
    """Results by number of the window, and facts that hold for all (``facts``).

    Args:
        path: File of lines; None keeps nothing beyond this object.
        fresh: Forget what is there.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False) -> None:
        self._path = path
        self._windows: dict[int, tuple[str, WindowResult]] = {}
        self.facts: dict[str, Any] = {}
        self.problem: str = ""
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh:
                path.unlink(missing_ok=True)
            path.touch()
            self._read(path.read_text(encoding="utf-8"))
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def result(self, number: int, ids_W: Tensor) -> WindowResult | None:
        """What was measured of that window, if it has these tokens."""
        ids, result = self._windows.get(number, ("", None))
        return result if result is not None and ids == _digest(ids_W) else None

    def add(self, number: int, ids_W: Tensor, result: WindowResult) -> None:
        """Keep a result."""
        ids = _digest(ids_W)
        self._windows[number] = ids, result
        self._append({"window": number, "ids": ids} | asdict(result))

    def learn(self, **facts: Any) -> None:
        """Keep facts about the model."""
        if new := {name: value for name, value in facts.items() if self.facts.get(name) != value}:
            self.facts |= new
            self._append({"facts": new})

    def _read(self, text: str) -> None:
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # torn by a crash: measured again
                entry = json.loads(line)
                if "facts" in entry:
                    self.facts |= entry["facts"]
                else:
                    result = WindowResult(float(entry["nll"]), entry["neurons"], entry["tokens"])
                    self._windows[int(entry["window"])] = entry["ids"], result

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            append_line(self._path, json.dumps(entry))
        except (OSError, ResourceError) as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._path, self.problem = None, reason


def open_store(key: Mapping[str, Any], *, fresh: bool = False) -> WindowStore:
    """The store of a model under a protocol.

    Args:
        key: What the figures depend on, ready for JSON; the versions of torch, transformers and our code join it.
        fresh: Forget what is there.
    """
    whole = json.dumps({**key, "made by": _makers()}, sort_keys=True)
    name = hashlib.sha256(whole.encode()).hexdigest()[:24]
    return WindowStore(cache_folder() / _FOLDER / f"{name}.jsonl", fresh=fresh)


@cache
def _makers() -> list[str]:
    """Versions of all that computes a figure; of the runtime its content, as one version has many states."""
    sha = hashlib.sha256()
    for unit in ("nn", "evaluate", "materialise"):
        sources = [file for file in (files("moesaic") / unit).iterdir() if file.name.endswith(".py")]
        for source in sorted(sources, key=lambda file: file.name):
            sha.update(source.read_bytes())
    return [moesaic.__version__, torch.__version__, transformers.__version__, sha.hexdigest()[:16]]


def _digest(ids_W: Tensor) -> str:
    return hashlib.sha256(ids_W.contiguous().numpy().astype("<i8").tobytes()).hexdigest()[:16]

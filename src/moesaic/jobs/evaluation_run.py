"""The state of one evaluation: which windows, in which precision; what is known of each model, and what is left to do.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moesaic.calibration.config import CalibrationConfig
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.activity import Activity, counting
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity, of_windows, window_loss
from moesaic.evaluate.proxy import ProxyPerplexity, proxy_change, proxy_perplexity
from moesaic.evaluate.window_store import WindowResult, WindowStore, open_store
from moesaic.jobs.native import beyond_memory, fp32_bytes
from moesaic.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["auto", "fp32", "bf16"]
SHORT = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}
"""How a protocol calls a dtype: fp32 goes without saying."""
_WARM_UP = 64
"""Tokens of a pass that counts for nothing: it reads the weights from disk and compiles kernels."""


def resolve_dtype(asked: Precision, checkpoint: Checkpoint, device: torch.device | None = None) -> torch.dtype:
    """The dtype in which all models of an evaluation compute.

    ``auto``: bf16 for a bf16 checkpoint where the device (None: the CPU) multiplies it natively, else fp32. A model
    that is too large for this machine in fp32 keeps its own dtype.
    """
    import torch

    if asked != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[asked]
    own = getattr(torch, checkpoint.dtype)
    native = own == torch.bfloat16 and CalibrationConfig().resolved_dtype(device) == own
    return own if native or beyond_memory(fp32_bytes(checkpoint), "a model in fp32") else torch.float32


@dataclass
class EvaluationRun:
    """What has been measured under one protocol.

    Attributes:
        name: Of the protocol.
        ids_NW: The windows.
        key: What every model's figures depend on beside the model (:mod:`moesaic.evaluate.window_store`).
        models: Number of models to come, this one included; counts down.
        later: What comes after the dense model, in windows of its speed; None: like this model.
        tokenizer: Set when proxy perplexity is wanted.
    """

    name: str
    ids_NW: Tensor
    key: Mapping[str, Any]
    models: int
    progress: Progress
    fresh: bool = False
    later: float | None = None
    tokenizer: Any = None
    measured: dict[str, Perplexity] = field(default_factory=dict)
    proxies: dict[str, ProxyPerplexity] = field(default_factory=dict)
    activity: dict[str, Activity] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measure(
        self,
        label: str,
        key: Mapping[str, Any],
        load: Callable[[], tuple[Any, dict[str, Any]]],
        also: Callable[[Any], None] | None = None,
    ) -> None:
        """Measure a model, or look up what was measured of it before.

        Args:
            label: Its row.
            key: What tells it from other models.
            load: The model, and facts about it to keep; called where something is left to do.
            also: What else is done with the loaded model.
        """
        store = open_store({**self.key, **key}, fresh=self.fresh)
        missing = [n for n, ids_W in enumerate(self.ids_NW) if store.result(n, ids_W) is None]
        before = "" if missing else ", measured before"
        if missing or also is not None or self.tokenizer is not None:
            model, facts = load()
            store.learn(**facts)
            if missing:
                self._windows(label, model, store, missing)
            if self.tokenizer is not None:
                self.proxies[label] = proxy_perplexity(model, self.tokenizer)
            self._add_up(label, store)
            self._say(label, before)
            if also is not None:
                also(model)
            del model
            self.later = None
            gc.collect()
        else:
            self._add_up(label, store)
            self._say(label, before)
        if store.problem:
            self.progress.note(f"the windows are not kept for a later run: {store.problem}")
        self.models -= 1

    def _windows(self, label: str, model: Any, store: WindowStore, missing: list[int]) -> None:
        """Measure the windows that the store lacks. The time of the first one tells how long all will take."""
        count, window = self.ids_NW.shape
        have = f", {count - len(missing)} of them measured before" if len(missing) < count else ""
        self.progress.note(f"perplexity of {label}: {count} windows of {window} tokens{have}")
        window_loss(model, self.ids_NW[0, :_WARM_UP])
        self.progress.start(label, len(missing))
        started = time.monotonic()
        for number in missing:
            self._window(model, store, number)
            if number == missing[0]:
                self.progress.note(self._left(time.monotonic() - started, len(missing) - 1))
            self.progress.advance()

    def _left(self, seconds: float, here: int) -> str:
        """How long it will take: this model's windows, and what comes after it."""
        text = f"{seconds:.1f} s a window; about {seconds * here:.0f} s left for it"
        if self.models > 1:
            others = (self.models - 1) * len(self.ids_NW) if self.later is None else self.later
            text += f", {seconds * (here + others) / 60:.1f} minutes for all {self.models} models"
        return text

    def _window(self, model: Any, store: WindowStore, number: int) -> None:
        with counting(model) as used:
            nll = window_loss(model, self.ids_NW[number])
        store.add(number, self.ids_NW[number], WindowResult(nll, used.neurons, used.tokens))

    def _add_up(self, label: str, store: WindowStore) -> None:
        losses, activity = [], Activity()
        for number, ids_W in enumerate(self.ids_NW):
            result = store.result(number, ids_W)
            assert result is not None
            losses.append(result.nll)
            for path, count in result.tokens.items():
                activity.tokens[path] = activity.tokens.get(path, 0) + count
                activity.neurons[path] = activity.neurons.get(path, 0.0) + result.neurons[path]
        self.measured[label] = of_windows(self.name, losses, self.ids_NW.shape[1])
        self.activity[label] = activity
        self.facts[label] = store.facts

    def _say(self, label: str, before: str) -> None:
        found, dense = self.measured[label], self.measured.get("dense")
        ratio = f", {compare(found, dense).shown()} times dense" if dense and label != "dense" else ""
        self.progress.note(f"{label}: perplexity {found.value:.3f}{ratio}{before}")

    def table(self) -> dict[str, Any]:
        """Perplexity of every model, for results.json."""
        dense = self.measured.get("dense")
        return {
            label: result.to_dict()
            | ({"ratio_to_dense": compare(result, dense).to_dict()} if dense and label != "dense" else {})
            | {name: value for name, value in self.facts[label].items() if name == "active_ffn_fraction"}
            for label, result in self.measured.items()
        }

    def proxy_table(self) -> dict[str, Any]:
        """Proxy perplexity of every model, for results.json."""
        dense = self.proxies.get("dense")
        return {
            label: {"name": result.name, "micro": result.micro, "macro": result.macro}
            | ({"change_percent": asdict(proxy_change(result, dense))} if dense and label != "dense" else {})
            for label, result in self.proxies.items()
        }

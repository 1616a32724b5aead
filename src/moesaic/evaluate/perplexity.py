"""Perplexity under one protocol.

Protocol: one token stream of the joined text, non-overlapping windows, no BOS inserted, the first token of each window
is not predicted, loss in fp32, mean over all predicted tokens. An incomplete last window is left out. The name of a
result says all of it: ``ppl[wikitext2-raw/test w2048 n=all]``; a model that is not in fp32 adds its dtype: ``bf16``.

Axes: N windows, W tokens per window, R of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import InputError
from moesaic.options.device import device_of
from moesaic.progress import Progress, Silent

_LOSS_BYTES = 16e6
"""Of logits in fp32 at once. Larger blocks are mapped anew each time, which took three times as long."""


@dataclass(frozen=True)
class Perplexity:
    """One model's perplexity on one text.

    ``window_nll``: summed negative log-likelihood per window, in nats; ``predicted``: predicted tokens per window.
    """

    name: str
    value: float
    predicted: int
    window_nll: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | {"window_nll": list(self.window_nll)}


def token_windows(tokenizer: Any, text: str, window: int, limit: int | None) -> Tensor:
    """The text as ids_NW, at most ``limit`` windows.

    Raises InputError when the text is shorter than one window, or nothing would be predicted.
    """
    if window < 2 or (limit is not None and limit < 1):
        raise InputError(f"{limit} windows of {window} tokens predict nothing", "use windows of at least two tokens")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // window
    if len(ids) == 0:
        raise InputError("the evaluation text is empty", "give another text")
    if count == 0:
        raise InputError(f"the evaluation text has {len(ids)} tokens, a window has {window}", "use a smaller --window")
    count = count if limit is None else min(count, limit)
    return ids[: count * window].view(count, window)


def protocol_name(dataset: str, window: int, limit: int | None, dtype: str = "") -> str:
    """The name under which a perplexity is reported. ``dtype``: of the model, where that is not fp32."""
    count = "all" if limit is None else limit
    return f"ppl[{dataset} w{window} n={count}{dtype and f' {dtype}'}]"


def perplexity(
    model: Callable[..., Any],
    ids_NW: Tensor,
    name: str,
    *,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a transformers causal language model over ``ids_NW``, one window at a time."""
    progress = progress or Silent()
    progress.start(name, len(ids_NW))
    window_nll = []
    for ids_W in ids_NW:
        window_nll.append(window_loss(model, ids_W))
        progress.advance()
    return of_windows(name, window_nll, ids_NW.shape[1])


@torch.inference_mode()
def window_loss(model: Callable[..., Any], ids_W: Tensor) -> float:
    """Summed negative log-likelihood of a window's tokens but the first, in nats, computed where the model is."""
    ids_W = ids_W.to(device_of(model))
    logits_WV = model(input_ids=ids_W[None], use_cache=False).logits[0]
    nll, rows = 0.0, max(1, int(_LOSS_BYTES / (4 * logits_WV.shape[-1])))
    for part_RV, targets_R in zip(logits_WV[:-1].split(rows), ids_W[1:].split(rows), strict=True):
        nll += F.cross_entropy(part_RV.float(), targets_R, reduction="sum").item()
    return nll


def of_windows(name: str, window_nll: Sequence[float], window: int) -> Perplexity:
    """The perplexity of windows of ``window`` tokens from what :func:`window_loss` gave of each."""
    predicted = len(window_nll) * (window - 1)
    total = sum(window_nll)
    value = math.exp(total / predicted) if total / predicted < 700 else math.inf
    return Perplexity(name, value, predicted, tuple(window_nll))

"""Proxy perplexity: eight short texts that come with moesaic, a few seconds per model, no download.

Definition (ours, MLPMoE's is not public [OURS]): each text is tokenised alone, with BOS if the tokenizer adds one, and
teacher-forced in a forward pass of its own; fp32 loss; the first token is not predicted. ``micro`` weighs every token
alike, ``macro`` every text. With some 1100 tokens in all, the choice of texts alone moves the figure by more than a few
percent: a change is reported with a paired interval, and perplexity over windows of a real corpus
(:mod:`moesaic.evaluate.perplexity`) remains the measure.

Axes: P texts, W tokens of a text, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import CheckpointError, InputError
from moesaic.options.device import device_of

TEXTS_SHA256 = "937b7397261a9c6d0a3110d61a6126047939d2929b6969e3c8e3fa72db6c50cb"


@dataclass(frozen=True)
class ProxyPerplexity:
    """One model on the proxy texts.

    ``text_nll``: summed negative log-likelihood per text, in nats; ``text_tokens``: predicted tokens per text.
    ``name`` says how many texts of which hash, and whether they stood in the chat template.
    """

    name: str
    text_nll: tuple[float, ...] = field(repr=False)
    text_tokens: tuple[int, ...] = field(repr=False)

    @property
    def micro(self) -> float:
        """exp of the mean loss over all predicted tokens."""
        return _exp(sum(self.text_nll) / sum(self.text_tokens))

    @property
    def macro(self) -> float:
        """Mean over texts of their perplexities."""
        return sum(_exp(nll / n) for nll, n in zip(self.text_nll, self.text_tokens, strict=True)) / len(self.text_nll)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | {"micro": self.micro, "macro": self.macro}


@dataclass(frozen=True)
class ProxyChange:
    """Change of the micro perplexity against the dense model, in percent, with its 95 % interval over texts."""

    percent: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For results.json."""
        return asdict(self)


def proxy_texts() -> list[str]:
    """The eight texts: prose, dialogue, code, maths, instruction, science, letter, history; written for moesaic.

    Raises CheckpointError when the installed file is not the released one: figures would not be comparable.
    """
    content = (resources.files("moesaic") / "data" / "proxy_texts.json").read_text(encoding="utf-8")
    texts = [entry["text"] for entry in json.loads(content)]
    if texts_digest(texts) != TEXTS_SHA256:
        raise CheckpointError("the proxy texts of this installation were changed", "install moesaic again")
    return texts


def texts_digest(texts: Sequence[str]) -> str:
    """sha256 of a list of texts, whatever the line ends or layout of the file they came in."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=True).encode()).hexdigest()


@torch.inference_mode()
def proxy_perplexity(
    model: Callable[..., Any], tokenizer: Any, texts: Sequence[str] | None = None, *, chat: bool = False
) -> ProxyPerplexity:
    """Proxy perplexity of a transformers causal language model.

    Args:
        model: Called with ``input_ids`` [1, W]; returns ``.logits`` [1, W, V].
        tokenizer: Its transformers tokenizer.
        texts: Other texts than the eight.
        chat: Put each text into the tokenizer's chat template, as a user's turn.

    Raises InputError for no texts, a text of fewer than two tokens, or ``chat`` without a template.
    """
    texts = proxy_texts() if texts is None else texts
    if not texts:
        raise InputError("proxy perplexity of no texts", "give at least one text")
    text_nll, text_tokens = [], []
    for number, text in enumerate(texts, start=1):
        ids_W = _tokens(tokenizer, text, chat).to(device_of(model))
        if len(ids_W) < 2:
            raise InputError(f"proxy text {number} has {len(ids_W)} tokens", "a text needs at least two")
        logits_WV = model(input_ids=ids_W[None], use_cache=False).logits[0]
        text_nll.append(F.cross_entropy(logits_WV[:-1].float(), ids_W[1:], reduction="sum").item())
        text_tokens.append(len(ids_W) - 1)
    name = f"proxy-ppl[{len(texts)} texts {texts_digest(texts)[:8]}{' chat' if chat else ''}]"
    return ProxyPerplexity(name, tuple(text_nll), tuple(text_tokens))


def proxy_change(
    model: ProxyPerplexity, dense: ProxyPerplexity, *, resamples: int = 2000, seed: int = 0
) -> ProxyChange:
    """100 (PPL - PPL_dense) / PPL_dense with a paired bootstrap over texts.

    Raises InputError when the two saw different texts or tokens.
    """
    if model.name != dense.name or model.text_tokens != dense.text_tokens:
        raise InputError(f"cannot compare {model.name} with {dense.name}", "run both on the same texts and tokenizer")
    tokens_P = np.array(model.text_tokens)
    difference_P = np.array(model.text_nll) - np.array(dense.text_nll)
    draws = np.random.default_rng(seed).integers(len(tokens_P), size=(resamples, len(tokens_P)))
    resampled = difference_P[draws].sum(axis=1) / tokens_P[draws].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return ProxyChange(*(100 * (_exp(float(d)) - 1) for d in (difference_P.sum() / tokens_P.sum(), low, high)))


def _tokens(tokenizer: Any, text: str, chat: bool) -> Tensor:
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"][0].long()
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template", "run the proxy without chat")
    # the template writes its own special tokens
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    return tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf

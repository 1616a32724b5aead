"""Does a folder compute in stock transformers what its blueprint says? Logits from a fresh process in which moesaic is
not imported.

The fresh process loads the folder in fp32, refuses missing and unexpected tensors, and hands over the logits of one
window at a time, and which experts each router chose.

Axes: N windows, W tokens per window, V vocabulary, K chosen experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.differences import Differences, before_any, join, logit_differences
from moesaic.evaluate.fresh_process import answers
from moesaic.evaluate.perplexity import token_windows
from moesaic.evaluate.runtime import Runtime

EXACT_TOLERANCE = 1e-4
"""Median |logit difference| over the largest |logit| of a target that computes the same function: fp32 rounding."""
UNDISTURBED_TOLERANCE = 1e-3
"""The largest such difference, where every router chose the same experts."""
NEAR_TIE = 1e-3
"""Largest distance from a tie (see :class:`Runtime`) at which rounding may decide for another expert."""
TIED_SHARE = 0.05
"""Largest share of tokens that may stand that near to a tie: routers that tell no experts apart are no routers."""
APPROXIMATE_KL = 1e-3
"""Largest mean KL divergence, in nats, of a target that reaches weights of 1 only in the limit."""

_KINDS = ("chosen", "weight")
_CHARACTERS = 64
"""Of the evaluation text per token wanted: more than any tokenizer takes for one."""

_SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

folder, work = sys.argv[1:]
multimodal = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type in MULTIMODAL
auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
model, info = auto.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, generation_config=GenerationConfig()
)
assert "moesaic" not in sys.modules
wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
if wrong:
    sys.exit("tensors do not fit the architecture: " + json.dumps(wrong)[:600])
# Two experts to a group: an expert and its twin.
slots = 2 if getattr(model.config.get_text_config(), "n_group", 1) > 1 else 1
found = {}
def keep(module, inputs, output):
    layer = len(found) // 2
    found[f"chosen{layer:05}"] = output[-1].reshape(-1, output[-1].shape[-1]) // slots
    found[f"weight{layer:05}"] = output[-2].reshape(-1, output[-2].shape[-1]).float()
for module in model.modules():
    if type(module).__name__.lower().endswith("topkrouter"):
        module.register_forward_hook(keep)
for ids in load_file(work + "/ids.safetensors")["ids"]:
    found.clear()
    with torch.inference_mode():
        logits = model.eval()(ids[None], use_cache=False).logits[0].float()
    found["logits"] = logits
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, work + "/result.safetensors")
    print("@ready", flush=True)
    sys.stdin.readline()
"""


@dataclass(frozen=True)
class NativeParity:
    """Stock transformers against the reference on the same tokens, fp32.

    Attributes:
        tokens: Tokens compared.
        exact: Whether the target computes the same function, or only approaches weights of 1.
        max_delta: Largest |logit difference|. Where two experts are nearly equal, rounding decides, and a token that
            takes the other one differs visibly: a few of them are in every long comparison.
        relative: That over the largest |logit| of the reference.
        median: The same of the token in the middle, when tokens are ordered by their largest |logit difference|.
        top1: Share of tokens whose likeliest next token is the same.
        mean_kl: Mean KL divergence of the folder's distribution from the reference's, nats.
        rerouted: Tokens of which some router chose other experts; None where the reference does not tell.
        undisturbed: Tokens with no such token in their window, up to and with themselves.
        undisturbed_delta: Largest |logit difference| of those.
        forced_delta: The largest |logit difference| of all tokens with the choices of stock transformers forced upon
            the reference: its experts where some router chose others, and its weights as well where weights of 1 are
            only approached or experts have weights of their own. None where nothing need be forced.
        tie: The largest distance from a tie of a token that is rerouted even so; where nothing was forced, of the first
            rerouted token of a window, which nothing before it disturbed.
        tied: Share of the tokens that are rerouted even so.
        near_tie: Largest ``tie`` that rounding explains.
    """

    tokens: int
    exact: bool
    max_delta: float
    relative: float
    median: float
    top1: float
    mean_kl: float
    rerouted: int | None = None
    undisturbed: int | None = None
    undisturbed_delta: float | None = None
    forced_delta: float | None = None
    tie: float | None = None
    tied: float | None = None
    near_tie: float = NEAR_TIE

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)

    def require(self, name: str) -> None:
        """Raise VerificationError when the folder is not what it should be."""
        scale = self.max_delta / self.relative if self.relative else 1.0
        forced, undisturbed = ((delta or 0.0) / scale for delta in (self.forced_delta, self.undisturbed_delta))
        right = forced <= UNDISTURBED_TOLERANCE and self._only_ties()
        if self.exact:
            # One near tie early in a window is enough to move every later token, and the median with them.
            disturbed = self.forced_delta is not None
            right &= undisturbed <= UNDISTURBED_TOLERANCE and (self.median <= EXACT_TOLERANCE or disturbed)
        else:
            right &= self.mean_kl <= APPROXIMATE_KL
        if not right:
            raise VerificationError(
                f"{name} in stock transformers differs from its blueprint: logits by {self.median:.1e} (median, "
                f"relative), mean KL {self.mean_kl:.1e}",
                "report it" if self.exact else "where weights of 1 are too coarse, glm4_moe has exact_weights",
            )

    def _only_ties(self) -> bool:
        """Whether routers chose other experts only where two were equal to within rounding, and for few tokens."""
        return (self.tie or 0.0) <= self.near_tie and (self.tied or 0.0) <= TIED_SHARE


@dataclass(frozen=True)
class Comparison:
    """Stock transformers against the reference, token by token.

    Attributes:
        differences: Of the N W tokens.
        scale: Largest |logit| of the reference.
        rerouted_NW: Tokens of which some router chose other experts; None where the reference does not tell.
        margin_NW: Each token's distance from a tie, see :class:`Runtime`; None as well.
        chosen: The experts that stock transformers chose, per window and MoE layer, [W, K].
        forced: ``forced_delta``, ``tie`` and ``tied`` of :class:`NativeParity`.
    """

    differences: Differences
    scale: float
    rerouted_NW: Tensor | None
    margin_NW: Tensor | None
    chosen: list[list[Tensor]] = field(repr=False)
    forced: tuple[float | None, float | None, float | None] = (None, None, None)


class StockWindow(NamedTuple):
    """What stock transformers computed of one window: logits_WV, and per MoE layer the chosen experts and their weights
    [W, K]."""

    logits_WV: Tensor
    chosen: list[Tensor]
    weights: list[Tensor]


def native_parity(
    folder: Path,
    ids_NW: Tensor,
    reference: Callable[[Tensor], Tensor],
    *,
    exact: bool,
    near_tie: float = NEAR_TIE,
) -> NativeParity:
    """Compare a folder in stock transformers with ``reference``, which maps ids_W to logits_WV.

    A :class:`Runtime` as reference tells which experts it chose, so that tokens of equal choices are judged apart.
    Raises VerificationError when stock transformers cannot load the folder, or misses or does not know a tensor of it.
    """
    found = compare_with_stock(folder, ids_NW, reference, weights=not exact)
    figures, scale = found.differences.figures(), found.scale
    rerouted = undisturbed = undisturbed_delta = None
    if found.rerouted_NW is not None:
        keep_NW = before_any(found.rerouted_NW)
        rerouted, undisturbed = int(found.rerouted_NW.sum()), int(keep_NW.sum())
        undisturbed_delta = found.differences.figures(keep_NW).max_delta if undisturbed else None
    return NativeParity(
        figures.tokens,
        exact,
        figures.max_delta,
        figures.max_delta / scale,
        figures.median / scale,
        figures.top1,
        figures.mean_kl,
        rerouted,
        undisturbed,
        undisturbed_delta,
        *found.forced,
        near_tie,
    )


def compare_with_stock(
    folder: Path, ids_NW: Tensor, reference: Callable[[Tensor], Tensor], *, weights: bool = False
) -> Comparison:
    """:func:`native_parity` with the figures of every token.

    ``weights``: stock weights are not exactly 1, and are forced upon the reference too.
    """
    parts: list[Differences] = []
    rerouted: list[Tensor] = []
    margins: list[Tensor] = []
    chosen: list[list[Tensor]] = []
    forced: list[tuple[float, float, int]] = []
    first: list[float] = []
    scale = 1e-30
    for ids_W, stock in zip(ids_NW, _stock_windows(folder, ids_NW), strict=True):
        expected_WV = reference(ids_W).float()
        parts.append(logit_differences(expected_WV, stock.logits_WV))
        scale = max(scale, expected_WV.abs().max().item())
        chosen.append(stock.chosen)
        if isinstance(reference, Runtime):
            rerouted.append(_rerouted(reference, stock.chosen))
            margins.append(reference.margin_W)
            if (weights or rerouted[-1].any()) and _can_force(reference, stock):
                # Weights other than 1 come with the experts that have them.
                forced.append(_forced(reference, ids_W, stock, weights or not reference.uniform))
            elif rerouted[-1].any():
                first.append(float(margins[-1][rerouted[-1]][0]))
    worst: tuple[float | None, float | None, float | None] = (None, max(first, default=None), None)
    if forced:
        tied = sum(count for _, _, count in forced) / ids_NW.numel()
        worst = (max(delta for delta, _, _ in forced), max(tie for _, tie, _ in forced), tied)
    rerouted_NW, margin_NW = (torch.stack(found) if found else None for found in (rerouted, margins))
    return Comparison(join(parts), scale, rerouted_NW, margin_NW, chosen, worst)


def _can_force(runtime: Runtime, stock: StockWindow) -> bool:
    """Whether stock layers choose as many experts as ours; some add pinned empty ones."""
    chosen = zip(runtime.routed, runtime.chosen, strict=True)
    return all(stock.chosen[layer].shape == own_WK.shape for layer, own_WK in chosen)


def _forced(runtime: Runtime, ids_W: Tensor, stock: StockWindow, weights: bool) -> tuple[float, float, int]:
    """With the experts (and weights) of stock transformers: the largest |logit difference|; and of the tokens for which
    the runtime would still have chosen others, the largest distance from a tie and the number."""
    runtime.forced = [
        (stock.chosen[layer], stock.weights[layer] * runtime.factor if weights else None) for layer in runtime.routed
    ]
    delta = float((runtime(ids_W).float() - stock.logits_WV).abs().max().nan_to_num(nan=float("inf")))
    runtime.forced = None
    marked_W = _rerouted(runtime, stock.chosen)
    return delta, float(runtime.margin_W[marked_W].max()) if marked_W.any() else 0.0, int(marked_W.sum())


def _rerouted(runtime: Runtime, stock: list[Tensor]) -> Tensor:
    """Mask [W] of the tokens of which some layer chose other experts. Stock layers may add pinned empty ones."""
    marked_W = torch.zeros(len(runtime.margin_W), dtype=torch.bool)
    for layer, own_WK in zip(runtime.routed, runtime.chosen, strict=True):
        same_WK = (own_WK[:, :, None] == stock[layer][:, None, :]).any(-1)
        marked_W |= ~same_WK.all(-1)
    return marked_W


def parity_ids(folder: Path, vocabulary: int, window: int, count: int = 1) -> Tensor:
    """ids_NW to compare on: the evaluation text by the folder's tokenizer, pseudo-random ids where it has none."""
    text = evaluation_text()[: _CHARACTERS * window * count]
    try:
        ids_NW = token_windows(load_tokenizer(folder), text, window, count)
    except (OSError, ValueError, KeyError, InputError):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (count, window), generator=generator)
    return ids_NW.clamp(max=vocabulary - 1)


def _stock_windows(folder: Path, ids_NW: Tensor) -> Iterator[StockWindow]:
    """Each window, from a fresh process without moesaic, which finds transformers where this one does."""
    for found in answers([sys.executable, "-P", "-c", _SCRIPT], folder, ids_NW, engine="stock transformers"):
        logits_WV = found.pop("logits")
        chosen, weights = ([found[name] for name in sorted(found) if name.startswith(kind)] for kind in _KINDS)
        yield StockWindow(logits_WV, chosen, weights)

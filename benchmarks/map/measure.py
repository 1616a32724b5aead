"""A dense model whose FFNs are computed by a reference: fitted once, then read window by window.

Axes: N windows, W tokens per window, D model width, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.map import grids
from benchmarks.map.cost import Shape
from benchmarks.map.references import Reference, ReferenceFFN, Scored, Tally, quantile
from benchmarks.map.rows import Row
from torch import Tensor, nn
from transformers import AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import max_positions
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.samples import evaluation_text, sample_text
from moesaic.calibration.skeleton import FFNStandIn
from moesaic.calibration.stream import LayerStream
from moesaic.calibration.text import build_windows
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.evaluate.perplexity import perplexity, protocol_name, token_windows
from moesaic.methods.neuron_experts.config import RIDGES
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.free_widths import held_out
from moesaic.solvers.refit import refit_chosen, token_weights

TEXTS: dict[str, tuple[str, Callable[[], str]]] = {
    "WikiText-2": ("wikitext2-raw/test", evaluation_text),
    "C4": ("c4 sample", lambda: sample_text("c4")),
    "code": ("code sample", lambda: sample_text("code")),
    "stories": ("tiny sample", lambda: sample_text("tiny")),
}
"""Texts that ship with moesaic: how a perplexity calls them, and where they are."""
FIT_TOKENS = 2048
"""Calibration tokens for thresholds, the first ones. All of them are for refits."""
NOISE_GROUP = 32
_BATCH = 1024
_SAMPLE = 997  # every so manieth score of a layer, for a threshold of all layers


@dataclass(frozen=True)
class Setting:
    """How windows are made and read: tokens per window, whether the weights have noise, texts -> number of windows."""

    window: int
    windows: dict[str, int]
    noise: bool = False


class Bench:
    """The model in ``folder``, its FFNs apart.

    Args:
        folder: A dense checkpoint.
        calibration: Texts and tokens for thresholds and refits, and the precision of everything.
        noise: Whether one step of a 4-bit grid is added to all FFN weights, as noise of a fixed seed.

    Raises:
        InputError: The model already is a MoE.
    """

    def __init__(self, folder: Path, calibration: CalibrationConfig, noise: bool = False) -> None:
        self.checkpoint = Checkpoint(folder)
        self.anatomy = read_anatomy(self.checkpoint.config)
        if any(site.expert is not None for site in self.anatomy.sites):
            raise InputError(f"{folder} already has experts", "give a dense model")
        self.noise = noise
        self.calibration = calibration
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.dtype = calibration.resolved_dtype()
        self.model = load_model(folder, self.dtype)
        self.table: dict[str, Callable[[Tensor], Tensor]] = {}
        self.weights: dict[str, FFNWeights] = {}
        generator = torch.Generator().manual_seed(0)
        for site in self.anatomy.sites:
            weights = load_ffn(self.checkpoint, site, self.anatomy.activation).to(torch.float32)
            if noise:
                matrices = {name: t for name, t in weights.tensors().items() if t.dim() == 2}
                changed = {name: grids.with_noise(t, NOISE_GROUP, generator) for name, t in matrices.items()}
                weights = replace(weights, **changed)
            self.weights[site.path] = weights.to(self.dtype)
            self.model.set_submodule(site.path, FFNStandIn(site.path, self.table))
            layer = self.model.get_submodule(self.anatomy.layer_path(site.layer))
            for name in self.anatomy.family.bypass:
                layer.set_submodule(name, nn.Identity())
        self._ids_NW: Tensor | None = None
        self._windows: dict[tuple[str, int, int], Tensor] = {}
        self._inputs: dict[str, Tensor] | None = None

    @property
    def shape(self) -> Shape:
        """Of its FFNs."""
        return Shape(self.anatomy.d_model, self.anatomy.d_ff, self.anatomy.gated)

    def calibration_ids(self) -> Tensor:
        """Calibration windows, ids_NW."""
        if self._ids_NW is None:
            longest = max_positions(self.checkpoint.config)
            self._ids_NW = build_windows(self.calibration, self.tokenizer, longest).ids_NW
        return self._ids_NW

    def windows(self, text: str, setting: Setting) -> Tensor:
        """The windows of a text, ids_NW; kept. Raises InputError when it is shorter than one."""
        key = (text, setting.window, setting.windows[text])
        if key not in self._windows:
            self._windows[key] = token_windows(self.tokenizer, TEXTS[text][1](), *key[1:])
        return self._windows[key]

    def measure(self, row: Row, setting: Setting, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The row's record on each of the texts; the FFNs are fitted once."""
        started = time.monotonic()
        ffns = self.fitted(row.reference)
        self.table.update(ffns)
        fit_seconds = round(time.monotonic() - started, 1)
        for text in texts:
            started = time.monotonic()
            for ffn in ffns.values():
                ffn.tally = Tally()
            count = setting.windows[text]
            name = protocol_name(TEXTS[text][0], setting.window, count)
            found = perplexity(self.model, self.windows(text, setting), name)
            used = [ffn.tally.used() for ffn in ffns.values()]
            yield {
                "row": row.key,
                "text": text,
                "window": setting.window,
                "windows": count,
                "noise": setting.noise,
                "perplexity": found.to_dict(),
                "used": {name: sum(getattr(u, name) for u in used) / len(used) for name in asdict(used[0])},
                "seconds": round(time.monotonic() - started, 1),
                "fit_seconds": fit_seconds,
            }

    @torch.no_grad()
    def fitted(self, reference: Reference) -> dict[str, ReferenceFFN]:
        """The FFNs of a reference, by path."""
        if isinstance(reference, Scored) and reference.refit:
            return self._refitted(reference)
        nothing = torch.empty(0, self.anatomy.d_model, dtype=self.dtype)
        inputs = self._dense_inputs() if reference.needs_text else dict.fromkeys(self.weights, nothing)
        ffns = {path: reference.fit(weights, inputs[path]) for path, weights in self.weights.items()}
        if isinstance(reference, Scored) and reference.choice == "shared":
            scores = []
            for path, ffn in ffns.items():
                assert ffn.score is not None
                score_TF = ffn.score(inputs[path], ffn.weights.hidden(inputs[path]))
                scores.append(score_TF.flatten()[::_SAMPLE])
            threshold = quantile(torch.cat(scores), reference.active)
            ffns = {path: replace(ffn, threshold=threshold) for path, ffn in ffns.items()}
        return ffns

    def _dense_inputs(self) -> dict[str, Tensor]:
        """What each FFN of the dense model reads of the first calibration tokens, x_TD by path; kept."""
        if self._inputs is None:
            seen: dict[str, list[Tensor]] = {path: [] for path in self.weights}

            def recorder(path: str) -> Callable[[Tensor], Tensor]:
                def record(x_TD: Tensor) -> Tensor:
                    seen[path].append(x_TD.clone())
                    return self.weights[path](x_TD)

                return record

            self.table.update({path: recorder(path) for path in self.weights})
            ids_NW = self.calibration_ids()
            for ids_W in ids_NW[: max(1, FIT_TOKENS // ids_NW.shape[1])]:
                self.model.base_model(input_ids=ids_W[None], use_cache=False)
            self._inputs = {path: torch.cat(parts) for path, parts in seen.items()}
        return self._inputs

    def _refitted(self, reference: Scored) -> dict[str, ReferenceFFN]:
        """Layer by layer on what the layers before it make of the calibration text; every token counts alike."""
        if self.noise:
            raise InputError("refits are not measured on weights with noise", "leave out the rows with refit")
        stream = LayerStream(self.checkpoint, self.anatomy, self.calibration_ids(), compute_dtype=self.dtype)
        ffns: dict[str, ReferenceFFN] = {}
        for layer in range(self.anatomy.num_layers):
            captured = stream.capture()
            for site in self.anatomy.sites_of(layer):
                weights, inputs = self.weights[site.path], captured[site.path]
                ffn = reference.fit(weights, inputs.x_TD[:FIT_TOKENS])
                batches = _wanted(weights, ffn, inputs.batches(_BATCH))
                down_DF = ffn.weights.down_DF.float()
                found = refit_chosen(
                    down_DF, batches, held_out(inputs.tokens), RIDGES, rounded=self.dtype == torch.bfloat16
                )
                down_DF = down_DF if found is None else found[0]
                ffn.weights = replace(ffn.weights, down_DF=reference.stored_down(down_DF).to(self.dtype))
                ffns[site.path] = ffn
            stream.advance({path: ffns[path] for path in captured})
        return ffns


def _wanted(
    weights: FFNWeights, ffn: ReferenceFFN, batches: Iterator[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Masked activations, what the dense FFN writes (its bias left out), and how much each token counts."""
    for x_TD in batches:
        y_TD = (weights.hidden(x_TD) @ weights.down_DF.T).float()
        yield ffn.masked(x_TD).float(), y_TD, token_weights(y_TD)

"""Is a split the same when it is made from other text or another seed, and does it keep its worth on other text?

    python -m benchmarks.stability MODEL --layers 2 12 25 --tokens 8192 --report docs/results/stability

Works on the inputs of single FFNs of the dense model; no model is converted. The settings are those of
`python -m benchmarks.compare`. Texts are the shipped samples, the first one is the domain calibrated on; windows of
calibration and of measurement never overlap. REPORT.json, .md and .png are written anew after each layer; rows that
the JSON has, under the same conditions, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from benchmarks.compare.cases import RECIPES, InexpressibleError, Shape, percent, settings_of
from benchmarks.rows import write_rows
from benchmarks.stability_measures import partition_agreement, reconstruction_errors, usage_agreement, used_neurons
from benchmarks.stability_page import LEFT_OUT, SECOND_HALF, SEED, draw, markdown
from torch import Tensor
from transformers import AutoTokenizer

from moesaic.adjust.router import fit_linear_router
from moesaic.anatomy import read_anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.inputs import SiteInputs
from moesaic.calibration.samples import SAMPLES, sample_text
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.console import fail, quiet_libraries, say
from moesaic.errors import InputError, MoesaicError
from moesaic.evaluate.fidelity import site_fidelity
from moesaic.evaluate.perplexity import token_windows
from moesaic.jobs.settings import ConvertSettings, method_config
from moesaic.materialise.apply import build_ffn
from moesaic.methods import get_method
from moesaic.methods.base import MethodModule
from moesaic.nn.ffn import FFNWeights
from moesaic.options import build

ROWS = [name for name, recipe in RECIPES.items() if not recipe.leading and recipe.method != "mlpmoe"]
HELD_OUT = "held out"
ORDER_SEED = 2**31
"""Of the other order of the neurons; far from the seeds that methods are given."""
FIDELITY = ("overlap", "chance", "energy_router", "energy_oracle", "load_entropy", "dead")


@dataclass(frozen=True)
class Texts:
    """Windows of all texts, int64 [N, W], and which of them are for what: ranges of N, by domain.

    ``calibration`` has the second half of the first domain's calibration text as well, under ``SECOND_HALF``.
    """

    ids_NW: Tensor
    calibration: dict[str, slice]
    heldout: dict[str, slice]

    def take(self, x_TD: Tensor, rows: slice) -> SiteInputs:
        """What an FFN read of these windows, without the residual stream's norms, so that tokens count alike in a plan
        as they do in the error; ``x_TD`` is what it read of all."""
        window = self.ids_NW.shape[1]
        return SiteInputs(x_TD[rows.start * window : rows.stop * window])


def read_texts(domains: Sequence[str], tokens: int, held: int, window: int, tokenizer: Any) -> Texts:
    """``tokens`` of each domain to calibrate on, twice of the first, and ``held`` more to measure on.

    Each text is cut into as many parts as it has uses, in the order of the text, so that two uses see other documents;
    a part gives windows at equal distances. (Windows from all over the text would share documents, and two of the
    samples repeat passages: the fits would be measured on what they were made from.)
    """
    if tokens % window or held % window or not tokens or not held:
        raise InputError(f"{tokens} and {held} tokens are no whole windows of {window}", "give multiples of --window")
    windows, calibration, heldout, row = [], {}, {}, 0
    for domain in domains:
        ids_NW = token_windows(tokenizer, sample_text(domain), window, None)
        uses = {domain: tokens} | ({SECOND_HALF: tokens} if domain == domains[0] else {}) | {HELD_OUT: held}
        wanted = sum(uses.values()) // window
        if wanted > len(ids_NW):
            raise InputError(
                f"{domain} has {len(ids_NW)} windows of {window} tokens, {wanted} are needed",
                "lower --tokens or --held",
            )
        done = 0
        for use, size in uses.items():
            count = size // window
            start, stop = (len(ids_NW) * edge // wanted for edge in (done, done + count))
            windows.append(ids_NW[start + torch.arange(count) * (stop - start) // count])
            rows = slice(row, row + count)
            if use == HELD_OUT:
                heldout[domain] = rows
            else:
                calibration[use] = rows
            done, row = done + count, rows.stop
    return Texts(torch.cat(windows), calibration, heldout)


class Site:
    """One FFN and what it read: makes plans, each once, and measures them."""

    def __init__(self, weights: FFNWeights, x_TD: Tensor, texts: Texts, settings: dict[str, ConvertSettings]) -> None:
        self.weights, self.settings = weights, settings
        self.calibration = {name: texts.take(x_TD, rows) for name, rows in texts.calibration.items()}
        self.heldout = {name: texts.take(x_TD, rows) for name, rows in texts.heldout.items()}
        self.window = texts.ids_NW.shape[1]
        self.everywhere = SiteInputs(torch.cat([inputs.x_TD for inputs in self.heldout.values()]))
        generator = torch.Generator().manual_seed(ORDER_SEED)
        self.order_F = torch.randperm(weights.d_ff, generator=generator)
        self.reordered = weights.take(self.order_F, keep_down_bias=True)
        self._made: dict[tuple[str, str, int, bool], LayerPlan] = {}

    def plan(self, name: str, text: str, seed: int, reordered: bool = False) -> LayerPlan:
        """The plan of a row of ``ROWS``, calibrated on a text; of the FFN as it is, or with its neurons reordered."""
        settings, weights = self.settings[name], self.reordered if reordered else self.weights
        base = self._base(settings, text, seed, reordered)
        if settings.router is None:
            return base
        return fit_linear_router(base, weights, self.calibration[text], settings.router)[0]

    def _base(self, settings: ConvertSettings, text: str, seed: int, reordered: bool) -> LayerPlan:
        """The method's own plan; kept as long as the same split is asked for, since rows may differ in the router."""
        config = method_config(settings)
        split = f"{settings.method} {config!r}"
        read = text if config.needs_calibration() else ""
        if not any(made[0] == split for made in self._made):
            self._made.clear()
        key = (split, read, seed, reordered)
        if key not in self._made:
            method = cast(MethodModule, get_method(settings.method))
            inputs = self.calibration[text] if read else None
            self._made[key] = method.plan_site(self.reordered if reordered else self.weights, inputs, config, seed)
        return self._made[key]

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """How far the plan agrees with those from other data and another seed, and what it is worth on held-out text.

        ``pairs``: that agreement, and the other plan's error on the first domain. ``domains``: on each domain, the plan
        calibrated on the first one, and the one calibrated there (``own``).
        """
        first, *others = self.heldout
        plan = self.plan(name, first, seed)
        made = {SECOND_HALF: self.plan(name, SECOND_HALF, seed), SEED: self.plan(name, first, seed + 1, True)}
        made |= {domain: self.plan(name, domain, seed) for domain in others}
        used_TF = used_neurons(self.weights, plan, self.everywhere)
        pairs = {}
        for pair, other in made.items():
            weights = self.reordered if pair == SEED else self.weights
            error = float(reconstruction_errors(weights, other, self.heldout[first]).mean())
            split = renumbered(other, self.order_F) if pair == SEED else other
            usage = usage_agreement(used_TF, used_neurons(self.weights, split, self.everywhere))
            pairs[pair] = asdict(partition_agreement(plan, split)) | asdict(usage) | {"error": error}
        domains = {}
        for domain in self.heldout:
            domains[domain] = self._worth(plan, domain)
            own = made.get(domain, plan)
            domains[domain]["own"] = dict(domains[domain]) if own is plan else self._worth(own, domain)
        return {"pairs": pairs, "domains": domains}

    def _worth(self, plan: LayerPlan, domain: str) -> dict[str, Any]:
        """Error, in the mean and of each window; of a routed plan also what its router does, and the share of the
        neurons that a token uses where experts differ in width."""
        errors_T = reconstruction_errors(self.weights, plan, self.heldout[domain])
        windows_N = errors_T.view(-1, self.window).mean(dim=1)
        found: dict[str, Any] = {"error": float(errors_T.mean()), "windows": [round(w, 6) for w in windows_N.tolist()]}
        if plan.router.kind == "static":
            return found
        fidelity = site_fidelity("", build_ffn(self.weights.to(torch.float32), plan), self.heldout[domain])
        if plan.load is not None:
            found["active"] = float(used_neurons(self.weights, plan, self.heldout[domain]).float().mean())
        return found | {name: getattr(fidelity, name) for name in FIDELITY}


def renumbered(plan: LayerPlan, order_F: Tensor) -> LayerPlan:
    """The split that a plan for ``weights.take(order_F)`` is in the numbers of ``weights``; without readout."""

    def original(index: Tensor) -> Tensor:
        return torch.where(index >= 0, order_F[index.clamp(min=0)], index)

    return replace(plan, shared=original(plan.shared), experts=tuple(map(original, plan.experts)), readout=None)


def main(argv: Sequence[str] | None = None) -> None:
    """Layer by layer, all rows of each, the report after each; what cannot work ends it with one line."""
    arguments = _parser().parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    try:
        _run(arguments)
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("--layers", nargs="+", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens of every plan")
    parser.add_argument("--held", type=int, default=4096, help="held-out tokens of each domain")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--domains", nargs="+", choices=list(SAMPLES), default=["wikitext", "c4", "code", "tiny"])
    parser.add_argument("--active", type=Fraction, default=Fraction(75), help="FFN neurons that a token uses, percent")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, required=True, help="path of the report without suffix")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    checkpoint = Checkpoint(arguments.model)
    anatomy = read_anatomy(checkpoint.config)
    layers = sorted(set(arguments.layers))
    for layer in layers:
        if not 0 <= layer < anatomy.num_layers:
            raise InputError(f"layer {layer} of a model with {anatomy.num_layers} layers", "layers count from 0")
        if len(anatomy.sites_of(layer)) != 1:
            raise InputError(f"layer {layer} has no single FFN that all tokens read", "give a dense model")
    shape, fraction = Shape(anatomy.num_layers, anatomy.d_ff, anatomy.gated), arguments.active / 100
    settings = {name: _settings(name, fraction, shape) for name in arguments.only}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = CalibrationConfig().resolved_dtype()
    about = _about(arguments, str(dtype).removeprefix("torch."))
    texts = read_texts(about["domains"], arguments.tokens, arguments.held, arguments.window, tokenizer)
    rows = kept_rows(arguments.report.with_suffix(".json"), about)
    done = {(row["layer"], row["row"]) for row in rows}
    stream = LayerStream(checkpoint, anatomy, texts.ids_NW, compute_dtype=dtype)
    for layer in range(layers[-1] + 1):
        wanted = {name: made for name, made in settings.items() if layer in layers and (layer, name) not in done}
        if wanted:
            (path,) = (site.path for site in anatomy.sites_of(layer))
            site = Site(stream.weights(path).to(torch.float32), stream.capture()[path].x_TD, texts, wanted)
            for name in wanted:
                started = time.process_time()
                row = {"row": name, "label": RECIPES[name].label, "layer": layer, "reads": reads(settings[name])}
                row |= site.measure(name, arguments.seed)
                rows.append(row | {"seconds": round(time.process_time() - started, 1)})
                say(f"layer {layer}  {name}  {rows[-1]['seconds']} s of processor time")
            rows.sort(key=lambda row: (row["layer"], ROWS.index(row["row"])))
            write_report(arguments.report, about, rows)
        if layer < layers[-1]:
            stream.advance()


def _settings(name: str, fraction: Fraction, shape: Shape) -> ConvertSettings:
    try:
        return build(ConvertSettings, settings_of(RECIPES[name], fraction, shape, 0), name)
    except InexpressibleError as reason:
        raise InputError(f"{name}: {reason}", "choose another --active, or leave it out with --only") from reason


def kept_rows(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run under the same conditions, which are not measured again."""
    if not file.exists():
        return []
    kept = json.loads(file.read_text(encoding="utf-8"))
    if changed := [name for name, value in about.items() if kept["about"].get(name) != value]:
        raise InputError(f"{file} holds rows of other conditions: {', '.join(changed)} differ", "give another --report")
    return kept["rows"]


def reads(settings: ConvertSettings) -> str:
    """What of a plan depends on the calibration text: ``text`` (the split), ``router`` alone, or ``nothing``."""
    if method_config(settings).needs_calibration():
        return "text"
    return "nothing" if settings.router is None else "router"


def _about(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    packages = {name: version(name) for name in ("moesaic", "torch", "transformers", "scipy")}
    kept = ("tokens", "held", "window", "seed", "threads")
    return {
        "model": arguments.model.resolve().name,
        "active": percent(arguments.active / 100),
        **{name: getattr(arguments, name) for name in kept},
        "domains": list(dict.fromkeys(arguments.domains)),
        "stream": dtype,
        "machine": platform.machine(),
        "versions": packages,
    }


def write_report(report: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """REPORT.json, .md and .png."""
    measured = {row["row"] for row in rows}
    left_out = LEFT_OUT | {RECIPES[name].label: "not measured in this run" for name in ROWS if name not in measured}
    everything = {"about": about, "rows": rows, "left_out": left_out}
    write_rows(report.with_suffix(".json"), everything)
    plot = report.with_suffix(".png")
    draw(rows, about["domains"], plot)
    report.with_suffix(".md").write_text(markdown(about, rows, left_out, plot.name), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Linear routers for CMoE partitions: agreement, energy kept and perplexity. Made the tables of docs/routers.md.

    python -m benchmarks.router_fit MODEL --layers 2,12,25             one layer at a time, on inputs of the dense model
    python -m benchmarks.router_fit MODEL --perplexity --layouts S3A3E8   whole model, layer after layer

Fits see --tokens of the calibration text, the last eighth of them held out; the table is of 8192 further ones.

Axes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.adjust.router import expert_energies, expert_networks, fit_linear_router, original_sets
from moesaic.adjust.router_config import RouterFitConfig
from moesaic.anatomy import read_anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.inputs import SiteInputs
from moesaic.calibration.samples import evaluation_text
from moesaic.calibration.stream import LayerStream
from moesaic.calibration.text import build_windows
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.perplexity import perplexity, protocol_name, token_windows
from moesaic.materialise.apply import apply_blueprint, build_ffn
from moesaic.methods.cmoe.config import Config
from moesaic.methods.cmoe.method import plan_site
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.router_fit import agreement, energy_kept, energy_shares, top_k_sets

TEST_TOKENS, WINDOW = 8192, 2048

VARIANTS = {
    "decisions, ridge": RouterFitConfig(mode="decisions"),
    "decisions, ridge + logistic": RouterFitConfig(mode="decisions", steps=40),
    "oracle raw, ridge": RouterFitConfig(targets="raw", steps=0),
    "oracle share, ridge": RouterFitConfig(targets="share", steps=0),
    "oracle amplitude, ridge": RouterFitConfig(steps=0),
    "oracle amplitude, ridge + logistic": RouterFitConfig(),
}


def open_stream(folder: Path, tokens: int) -> LayerStream:
    checkpoint = Checkpoint(folder)
    config = CalibrationConfig(tokens=tokens, window=WINDOW)
    windows = build_windows(config, AutoTokenizer.from_pretrained(folder), WINDOW)
    return LayerStream(
        checkpoint, read_anatomy(checkpoint.config), windows.ids_NW, compute_dtype=config.resolved_dtype()
    )


def rows(weights: FFNWeights, fit: SiteInputs, test: SiteInputs, layout: str) -> Iterator[tuple[str, float, ...]]:
    """Name, agreement with CMoE's router, with the oracle, energy kept; all on the test tokens."""
    plan = plan_site(weights, fit, Config(layout=layout), 0)
    weights = weights.to(fit.x_TD.dtype)
    energy_TE = expert_energies(expert_networks(weights, plan), test)
    original_TE, oracle_TE = original_sets(weights, plan, test), top_k_sets(energy_TE, plan.top_k)

    def row(name: str, set_TE: Tensor) -> tuple[str, float, ...]:
        return (
            name,
            agreement(set_TE, original_TE),
            agreement(set_TE, oracle_TE),
            energy_kept(set_TE, energy_TE),
        )

    fixed_E = energy_shares(energy_TE).mean(dim=0)
    yield row("the oracle", oracle_TE)
    yield row("no routing: the best fixed experts", top_k_sets(fixed_E.expand_as(energy_TE), plan.top_k))
    yield row("CMoE's gated router", original_TE)
    for name, config in VARIANTS.items():
        fitted, _ = fit_linear_router(plan, weights, fit, config)
        yield row(name, original_sets(weights, fitted, test))


def by_layer(folder: Path, layers: list[int], layouts: list[str], tokens: int) -> None:
    stream = open_stream(folder, tokens + TEST_TOKENS)
    print("| layer | layout | router | agrees with CMoE's | with the oracle | energy kept |\n" + "|---" * 6 + "|")
    for layer in range(max(layers) + 1):
        if layer in layers:
            site = stream.anatomy.sites_of(layer)[0]
            x_TD = stream.capture()[site.path].x_TD
            weights = load_ffn(stream.checkpoint, site, stream.anatomy.activation)
            for layout in layouts:
                fit, test = SiteInputs(x_TD[:tokens]), SiteInputs(x_TD[tokens:])
                for name, *shares in rows(weights, fit, test, layout):
                    cells = [str(layer), layout, name, *(f"{share:.3f}" for share in shares)]
                    print(f"| {' | '.join(cells)} |", flush=True)
        stream.advance()


def convert(stream: LayerStream, layout: str, config: RouterFitConfig | None) -> dict[str, LayerPlan]:
    """CMoE's plans, each layer calibrated behind the converted ones before it; ``config``: refit the router."""
    plans = {}
    for layer in range(stream.num_layers):
        site = stream.anatomy.sites_of(layer)[0]
        inputs, weights = stream.capture()[site.path], stream.weights(site.path)
        plan = plan_site(weights, inputs, Config(layout=layout), 0)
        if config is not None:
            plan, _ = fit_linear_router(plan, weights, inputs, config)
        plans[site.path] = plan
        stream.advance({site.path: build_ffn(weights, plan)})
    return plans


def whole_model(folder: Path, layouts: list[str], tokens: int, windows: int) -> None:
    ids_NW = token_windows(AutoTokenizer.from_pretrained(folder), evaluation_text(), 1024, windows)
    name = protocol_name("wikitext2-raw/test", 1024, windows)
    configs = {
        "gated": None,
        "linear, decisions": RouterFitConfig(mode="decisions"),
        "linear, oracle": RouterFitConfig(),
    }
    dtype = CalibrationConfig().resolved_dtype()
    dense = perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), ids_NW, name).value
    print(
        f"| layout | router | {name} | ratio to dense |\n|---|---|---|---|\n| dense | - | {dense:.2f} | 1 |", flush=True
    )
    for layout in layouts:
        for label, config in configs.items():
            stream = open_stream(folder, tokens)
            plans = convert(stream, layout, config)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            blueprint = Blueprint(stream.anatomy.family.name, "", "cmoe", {}, plans)
            apply_blueprint(model, blueprint, stream.anatomy)
            value = perplexity(model, ids_NW, name).value
            print(f"| {layout} | {label} | {value:.2f} | {value / dense:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a dense checkpoint")
    parser.add_argument("--layers", default="12", help="decoder layers, comma-separated")
    parser.add_argument("--layouts", default="S3A3E8,S2A2E8", help="SxAyEz, comma-separated")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens, a multiple of 2048")
    parser.add_argument("--perplexity", action="store_true", help="convert the whole model and measure perplexity")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 1024 tokens")
    arguments = parser.parse_args()
    layouts = arguments.layouts.split(",")
    torch.manual_seed(0)
    if arguments.perplexity:
        whole_model(arguments.model, layouts, arguments.tokens, arguments.windows)
    else:
        by_layer(arguments.model, [int(layer) for layer in arguments.layers.split(",")], layouts, arguments.tokens)


if __name__ == "__main__":
    main()

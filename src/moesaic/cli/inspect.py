"""``moesaic inspect OUT``: what a converted model is made of; with a second folder, how two conversions differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.checkpoint.mark import tuned
from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, table

if TYPE_CHECKING:
    from moesaic.blueprint.model import Blueprint
    from moesaic.checkpoint.reader import Checkpoint


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="inspect")(run)


def run(
    folder: opt.Folder,
    diff: Annotated[Path | None, typer.Option("--diff", help="Another output: show how the blueprints differ.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show what every FFN of OUT has become, and what was measured."""
    from moesaic.checkpoint.converted import current_results, provenance, read_blueprint
    from moesaic.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(folder)
    if diff is not None:
        lines = _blueprint(checkpoint).diff(_blueprint(Checkpoint(diff)))
        emit_json(lines) if as_json else emit("\n".join(lines) or "the two convert alike")
        return
    blueprint = read_blueprint(checkpoint, hashed=False)
    sites = {} if blueprint is None else blueprint.sites
    rows = [_row(path, sites[path]) for path in sorted(sites, key=_numbered)]
    results = current_results(checkpoint)
    made = provenance(checkpoint)
    if as_json:
        digest = None if blueprint is None else blueprint.digest()
        emit_json({"method": made["method"], "config": made["config"], "digest": digest, "sites": rows})
        return
    emit(f"method     {made['method']} {made['config']}")
    emit(f"family     {checkpoint.config['model_type'] if blueprint is None else blueprint.family}")
    emit(f"blueprint  {_gone(checkpoint) if blueprint is None else blueprint.digest()[:16]}")
    if rows:
        emit("")
        headers = ["FFN", "neurons", "shared", "experts", "width", "top-k", "active", "router", "gate"]
        emit(table(headers, [[str(value) for value in row.values()] for row in rows]))
    for name, measured in results.get("evaluation", {}).items():
        emit("")
        for label, row in measured["perplexity"].items():
            ratio = row.get("ratio_to_dense")
            emit(f"{name} {label:8} {row['value']:.3f}" + (f"  {ratio['ratio']:.3f}x dense" if ratio else ""))


def _blueprint(checkpoint: Checkpoint) -> Blueprint:
    from moesaic.checkpoint.converted import read_blueprint
    from moesaic.errors import InputError

    if (blueprint := read_blueprint(checkpoint, hashed=False)) is None:
        raise InputError(
            f"the blueprint of {checkpoint.folder} is {_gone(checkpoint)}",
            "give the conversion that was trained: a training in transformers leaves the split as it was",
        )
    return blueprint


def _gone(checkpoint: Checkpoint) -> str:
    return f"gone: {tuned(checkpoint.config) or 'without manifest.json nothing says whether it holds'}"


def _numbered(path: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _row(path: str, plan: Any) -> dict[str, Any]:
    widths = [len(expert) for expert in plan.experts]
    return {
        "site": path,
        "neurons": plan.d_ff,
        "shared": len(plan.shared),
        "experts": len(plan.experts),
        "width": f"{min(widths)}-{max(widths)}" if len(set(widths)) > 1 else plan.expert_width,
        "top_k": plan.top_k,
        "active": f"{plan.active_neurons / plan.d_ff:.1%}",
        "router": "high half of int8" if plan.int8 else plan.router.kind,
        "gate": plan.gate,
    }

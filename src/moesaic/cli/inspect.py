"""``moesaic inspect OUT``: what a converted model is made of; with a second folder, how two conversions differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.checkpoint.results import read_results
from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, table


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="inspect")(run)


def run(
    folder: opt.Folder,
    diff: Annotated[Path | None, typer.Option("--diff", help="Another output: show how the blueprints differ.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show method, layout and experts of every converted FFN, and what has been measured."""
    from moesaic.blueprint import Blueprint

    blueprint = Blueprint.load(folder)
    if diff is not None:
        lines = blueprint.diff(Blueprint.load(diff))
        emit_json(lines) if as_json else emit("\n".join(lines) or "the two convert alike")
        return
    rows = [_row(path, plan) for path, plan in blueprint.sites.items()]
    results = read_results(folder)
    if as_json:
        emit_json({"method": blueprint.method, "config": blueprint.config, "digest": blueprint.digest(), "sites": rows})
        return
    emit(f"method     {blueprint.method} {blueprint.config}")
    emit(f"family     {blueprint.family}")
    emit(f"blueprint  {blueprint.digest()[:16]}")
    emit("")
    headers = ["FFN", "neurons", "shared", "experts", "width", "top-k", "active", "router", "gate"]
    emit(table(headers, [[str(value) for value in row.values()] for row in rows]))
    for name, measured in results.get("evaluation", {}).items():
        emit("")
        for label, row in measured["perplexity"].items():
            ratio = row.get("ratio_to_dense")
            emit(f"{name} {label:8} {row['value']:.3f}" + (f"  {ratio['ratio']:.3f}x dense" if ratio else ""))


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
        "router": plan.router.kind,
        "gate": plan.gate,
    }

"""``moesaic eval OUT --baseline MODEL``: perplexity beside the dense model and the controls, router fidelity, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, table

_QUICK = 1024


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="eval")(run)


def run(
    model: opt.Model,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The dense model, under the same protocol.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text file. Default: WikiText-2 raw test, shipped.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Tokens per window. Default: 2048, or the model's context if shorter.", min=2),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Windows to evaluate. Default: all.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="16 windows of 1024 tokens, if not told otherwise.")] = False,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also static pruning and a random partition at the same active fraction.")
    ] = False,
    no_fidelity: Annotated[
        bool, typer.Option("--no-fidelity", help="Leave router fidelity on the first windows out.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Prefill and decode speed beside the baseline.")] = False,
    proxy: Annotated[bool, typer.Option("--proxy", help="Also MLPMoE's proxy perplexity on eight texts.")] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a converted model beside the dense one. Results go to stdout and into OUT/results.json."""
    from moesaic.anatomy.base import clipped
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.checkpoint.source import resolve_model

    if model.endswith(".gguf") or (baseline or "").endswith(".gguf"):
        quiet_libraries()  # transformers dequantises it
    checkpoint, *dense = [Checkpoint(resolve_model(name)) for name in (model, baseline) if name is not None]
    if quick and window is None:
        window = clipped(_QUICK, checkpoint.config)
    quiet_libraries()
    from moesaic.jobs.evaluate import evaluate_model

    results = evaluate_model(
        checkpoint.folder,
        baseline=dense[0].folder if dense else None,
        text=text,
        window=window,
        limit=16 if quick and limit is None else limit,
        controls=controls,
        fidelity=not no_fidelity,
        speed=speed,
        proxy=proxy,
        progress=ConsoleProgress(quiet),
    )
    emit_json(results) if as_json else emit(render(results))


def render(results: dict[str, Any]) -> str:
    """The results as plain tables."""
    from moesaic.evaluate.comparison import Comparison

    rows = []
    for label, result in results["perplexity"].items():
        ratio = result.get("ratio_to_dense")
        interval = Comparison(**ratio).shown() if ratio else ""
        rows.append([label, f"{result['value']:.2f}", interval])
    parts = [results["protocol"], "", table(["model", "perplexity", "ratio to dense [95 %]"], rows)]
    if "active_ffn_fraction" in results:
        fraction, planned = (f"{results[f'active_ffn_{name}']:.1%}" for name in ("fraction", "planned"))
        on_text = "" if fraction == planned else f" on this text ({planned} planned)"
        parts.append(f"\nactive FFN fraction {fraction}{on_text}, {results['parameters'] / 1e6:.1f} M parameters")
        if on_text and results.get("other_budgets"):
            parts.append(
                "another budget for text like this: moesaic convert MODEL NEW --blueprint OUT --budget A --calib TEXT"
            )
    if summary := results.get("fidelity", {}).get("summary"):
        parts.append(
            f"router: {summary['overlap']:.1%} of the oracle's experts chosen (chance {summary['chance']:.1%}); "
            f"energy kept {summary['energy_router']:.1%}, oracle {summary['energy_oracle']:.1%}; "
            f"load entropy {summary['load_entropy']:.3f}, dead experts {summary['dead_experts']:.0f}"
        )
    for label, row in results.get("proxy", {}).items():
        change = row.get("change_percent")
        note = f"  {change['percent']:+.4f} % [{change['low']:+.4f}, {change['high']:+.4f}]" if change else ""
        parts.append(f"{row['name']} {label:8} {row['micro']:.3f}{note}")
    if speed := results.get("speed"):
        speeds = [[k, f"{v['prefill']:.1f}", f"{v['decode']:.1f}"] for k, v in speed.items()]
        parts.append("\n" + table(["model", "prefill tokens/s", "decode tokens/s"], speeds))
    return "\n".join(parts)

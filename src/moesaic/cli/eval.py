"""``moesaic eval OUT --baseline MODEL``: perplexity beside the dense model and the controls, router fidelity, speed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, say, table
from moesaic.errors import InputError
from moesaic.options.device import AUTO

if TYPE_CHECKING:
    from moesaic.jobs.evaluation_run import Precision

_PRECISIONS = ("auto", "fp32", "bf16")


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
    full: Annotated[bool, typer.Option("--full", help="All windows of the text, of 2048 tokens.")] = False,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            help="Tokens per window. Default: 1024, with --full 2048, or the model's context if shorter.",
            min=2,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Windows to evaluate. Default: 16, with --full all.", min=1)
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="fp32, bf16 or auto, for all models: bf16 for a bf16 checkpoint where the CPU multiplies it natively, "
            "else fp32.",
        ),
    ] = "auto",
    controls: Annotated[
        bool, typer.Option("--controls", help="Also static pruning and a random partition at the same active fraction.")
    ] = False,
    no_fidelity: Annotated[
        bool, typer.Option("--no-fidelity", help="Leave router fidelity on the first windows out.")
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Prefill and decode speed beside the baseline.")] = False,
    proxy: Annotated[bool, typer.Option("--proxy", help="Also MLPMoE's proxy perplexity on eight texts.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what is in the cache of an earlier evaluation.")
    ] = False,
    device: opt.DeviceName = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure a converted model beside the dense one. Results go to stdout and into OUT/results.json.

    Each figure is printed and saved when it is known. Interrupted, the same command goes on.
    """
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.checkpoint.source import resolve_model

    if dtype not in _PRECISIONS:
        raise InputError(f"unknown --dtype {dtype!r}", f"known: {', '.join(_PRECISIONS)}")
    if full and limit is not None:
        raise InputError("both --full and --limit are given", "give one of them")
    if model.endswith(".gguf") or (baseline or "").endswith(".gguf"):
        quiet_libraries(quiet)  # transformers dequantises it
    checkpoint, *dense = [Checkpoint(resolve_model(name)) for name in (model, baseline) if name is not None]
    quiet_libraries(quiet)
    from moesaic.jobs.evaluate import evaluate_model

    results = evaluate_model(
        checkpoint.folder,
        baseline=dense[0].folder if dense else None,
        text=text,
        window=window,
        limit=limit,
        full=full,
        dtype=cast("Precision", dtype),
        controls=controls,
        fidelity=not no_fidelity,
        speed=speed,
        proxy=proxy,
        fresh=fresh,
        device=device or AUTO,
        progress=ConsoleProgress(quiet),
    )
    emit_json(results) if as_json else emit(render(results))
    if "moesaic" in checkpoint.config and not (as_json or quiet):
        beside = [] if baseline is None else ["--baseline", baseline]
        say(f"next: {shlex.join(['moesaic', 'report', model, *beside])}")


def render(results: dict[str, Any]) -> str:
    """The results as plain tables: what each model costs and what it gains stand in one row."""
    parts = [results["protocol"], "", _table(results)]
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
    return "\n".join(parts)


def _table(results: dict[str, Any]) -> str:
    """A row per model. Shares and speeds stand in columns of their own where they were measured."""
    from moesaic.evaluate.comparison import Comparison

    speed = results.get("speed", {})
    shares = {label: row.get("active_ffn_fraction") for label, row in results["perplexity"].items()}
    shares |= {"dense": 1.0, "model": results.get("active_ffn_fraction")}
    headers = ["model", "active FFN", "perplexity", "ratio to dense [95 %]"]
    headers += ["prefill tok/s", "decode tok/s", "decode x dense"] if speed else []
    rows = []
    for label, result in results["perplexity"].items():
        ratio, share = result.get("ratio_to_dense"), shares[label]
        row = [label, "" if share is None else f"{share:.1%}", f"{result['value']:.2f}"]
        row.append(Comparison(**ratio).shown() if ratio else "")
        if speed:
            found = speed.get(label)
            gain = "" if not found else f"{found['decode'] / speed['dense']['decode']:.2f}"
            row += [f"{found['prefill']:.1f}", f"{found['decode']:.1f}", gain] if found else ["", "", ""]
        rows.append(row)
    return table(headers, rows)

"""``moesaic tune OUT OUT2``: a little training of a converted model, to win back what the conversion cost."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, duration, emit, emit_json, native_line, quiet_libraries
from moesaic.options import build, put
from moesaic.options.device import AUTO
from moesaic.tune.config import DEFAULT_PRESET, PRESETS, TuneConfig, preset


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="tune")(run)


def run(
    folder: opt.Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT2", help="Folder to create; it appears when complete.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The dense model: folder, .gguf or hub id; teacher of distillation."),
    ] = None,
    preset_name: Annotated[str, typer.Option("--preset", help=f"Recipe: {', '.join(PRESETS)}.")] = DEFAULT_PRESET,
    config: opt.Config = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting, e.g. lora.rank=16, train.batch=2; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SOURCE", help="Training text, as --calib of convert. Repeatable."),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Distinct training tokens.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens per sequence.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of text, order and adapters.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished run.")] = False,
    teacher_cache: Annotated[
        Path | None,
        typer.Option("--teacher-cache", metavar="DIR", help="Keep the dense model's last hidden states for later."),
    ] = None,
    device: opt.DeviceName = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train OUT a little, to win back part of what was lost.

    It is trained towards the dense model or on text, and OUT2 has the same architecture.

    Interrupted, the same command resumes. `accelerate launch -m moesaic tune ...` trains in several processes.
    """
    from moesaic.jobs.settings import load_settings

    values = load_settings(config) if config is not None else {}
    values = opt.with_pairs(values, options, TuneConfig, "tune", "config={} of moesaic.jobs.tune.tune")
    text = {"sources": data, "tokens": tokens, "window": window, "seed": seed}
    train = {"steps": steps, "seed": seed}
    for section, given in {"train.data": text, "train": train}.items():
        for key, value in given.items():
            if value is not None:
                put(values, f"{section}.{key}", value)
    settings = build(TuneConfig, preset(preset_name, values), "tune")
    from moesaic.jobs.tune_request import check_tune
    from moesaic.train.launch import is_worker

    check_tune(folder, settings, out, baseline, teacher_cache)  # a slip is answered before torch is imported
    quiet_libraries(quiet)
    from moesaic.jobs.tune import tune

    progress = ConsoleProgress(quiet)
    done = tune(
        folder,
        out,
        baseline=baseline,
        config=settings,
        preset_name=preset_name,
        restart=restart,
        teacher_cache=teacher_cache,
        device=device or AUTO,
        progress=progress,
    )
    if is_worker():
        return
    if as_json:
        emit_json({"output": str(done.output), "target": done.target} | done.results)
        return
    for line in _report(str(done.output), done.target, done.results):
        emit(line)
    if baseline is not None:
        emit("undo: not possible, its weights were trained; keep OUT and the dense model")
        emit(f"next: {shlex.join(['moesaic', 'eval', str(done.output), '--baseline', str(baseline)])}")


def _report(output: str, target: str, results: dict[str, Any]) -> list[str]:
    made = results["tune"]
    lines = [
        f"{output}: {target}, {', '.join(made['trained'])} trained for {made['steps']} steps on {made['tokens']} "
        f"tokens in {duration(made['seconds'])}"
    ]
    before, after = made["held_out"]["before"], made["held_out"]["after"]
    if after:
        found = [f"perplexity {math.exp(before['next_token']):.2f} -> {math.exp(after['next_token']):.2f}"]
        if "kl" in after:
            found.append(f"KL from the dense model {before['kl']:.4f} -> {after['kl']:.4f}")
        stopped = ", stopped early" if made["stopped_early"] else ""
        lines.append(f"held-out text: {'; '.join(found)} (best after step {made['best_step']}{stopped})")
    if native := results.get("native_parity"):
        lines.append(native_line(native))
    else:
        lines.append(f"written folder against the trained model: relative {results['tune_parity']['relative']:.1e}")
    return lines

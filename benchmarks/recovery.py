"""How much of the perplexity that a conversion costs comes back by a little training: before, after, dense, one table.

    python -m benchmarks.recovery MODEL WORK --data TEXT [--data TEXT ...] [--samples 2048] [--window 512]

WORK keeps conversions and tuned folders, so that an interrupted run goes on where it was. --time N only measures N
training steps and says how long the whole run would take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.rows import write_rows

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.console import ConsoleProgress, quiet_libraries
from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import Perplexity
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.tune import tune
from moesaic.progress import Silent

CASES: dict[str, dict[str, Any]] = {
    "CMoE S3A3E8": {"method": "cmoe", "options": {"layout": "S3A3E8"}, "router": "oracle"},
    "CMoE S2A2E8": {"method": "cmoe", "options": {"layout": "S2A2E8"}, "router": "oracle"},
    "Fractal Fade, neurons": {"method": "mlpmoe", "options": {"branches": 8, "fade_max": 0.4, "fade_unit": "neuron"}},
    "Token clusters, union": {
        "method": "token_clusters",
        "options": {"active": 0.5, "split": "union", "widths": "equal", "token_weight": "equal"},
    },
}
RESULTS = Path(__file__).parents[1] / "docs" / "results"
TEXT = "wikitext2-raw/test"


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.time:
        _time(arguments)
        return
    rows = []
    for name, how in CASES.items():
        if arguments.only is None or name in arguments.only:
            rows.append(_case(name, how, arguments))
            _write(rows, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", action="append", required=True, help="training text; repeatable")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--distinct", type=int, default=None, help="distinct windows; default: as many as samples")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--preset", default="distill")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows of 1024 tokens")
    parser.add_argument("--results", default="recovery", help="name of the page in docs/results")
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--time", type=int, default=0, metavar="N", help="measure N steps of the first case alone")
    return parser.parse_args()


def _train_keys(arguments: argparse.Namespace, steps: int, batch: int) -> dict[str, Any]:
    text = {"sources": arguments.data, "window": arguments.window}
    text["tokens"] = (arguments.distinct or arguments.samples) * arguments.window
    return {"steps": steps, "batch": batch, "data": text, "held_out": 16, "eval_every": 64, "save_every": 16}


def _converted(name: str, how: dict[str, Any], arguments: argparse.Namespace) -> Path:
    out = arguments.work / name.lower().replace(",", "").replace(" ", "-")
    if not out.exists():
        print(f"{name}: converting", flush=True)
        moesaic.convert(arguments.model, out, **how)
    return out


def _case(name: str, how: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    folder = _converted(name, how, arguments)
    out = folder.with_name(f"{folder.name}-tuned")
    if not out.exists():
        train = _train_keys(arguments, arguments.samples // arguments.batch, arguments.batch)
        print(f"{name}: training", flush=True)
        tune(
            folder,
            out,
            baseline=arguments.model,
            preset_name=arguments.preset,
            config={"train": train},
            teacher_cache=arguments.work / "teacher",
            progress=ConsoleProgress(),
        )
    dense = _perplexity(arguments.model, arguments)
    before, after = (_perplexity(path, arguments) for path in (folder, out))
    made = json.loads((out / "results.json").read_text())["tune"]
    config = Checkpoint(out).config
    return {
        "case": name,
        "target": config["moesaic"].get("target", config["model_type"]),
        "dense": dense.value,
        "before": _against(before, dense),
        "after": _against(after, dense),
        "tune": {
            key: made[key] for key in ("preset", "trained", "steps", "best_step", "tokens", "seconds", "held_out")
        },
    }


def _perplexity(folder: Path, arguments: argparse.Namespace) -> Perplexity:
    """Of a folder; kept in WORK."""
    kept = arguments.work / f"{folder.name}.{arguments.windows}.json"
    if not kept.exists():
        found = evaluate_model(folder, window=1024, limit=arguments.windows, fidelity=False, save=False)
        write_rows(kept, found["perplexity"]["model"])
    table = json.loads(kept.read_text(encoding="utf-8"))
    return Perplexity(**(table | {"window_nll": tuple(table["window_nll"])}))


def _against(model: Perplexity, dense: Perplexity) -> dict[str, Any]:
    return {"value": model.value, "ratio_to_dense": compare(model, dense).to_dict()}


def _time(arguments: argparse.Namespace) -> None:
    """Print the mean time of a step, the first one (slower: oneDNN compiles its kernels) included."""
    name, how = next(iter(CASES.items()))
    folder = _converted(name, how, arguments)
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        train = _train_keys(arguments, arguments.time, arguments.batch) | {"held_out": 0, "warmup": 0}
        train["data"] = {**train["data"], "tokens": 8 * arguments.window}
        started = time.monotonic()
        out = Path(scratch) / "out"
        config = {"train": train}
        tune(folder, out, baseline=arguments.model, preset_name=arguments.preset, config=config, progress=Silent())
        seconds = json.loads((out / "results.json").read_text())["tune"]["seconds"]
    per_step = seconds / arguments.time
    hours = per_step * arguments.samples / arguments.batch / 3600
    print(
        f"{per_step:.2f} s per step of {arguments.batch} x {arguments.window} tokens, {torch.get_num_threads()} threads"
    )
    print(f"{arguments.samples} samples: {hours:.2f} h a model; all of this took {time.monotonic() - started:.0f} s")


def _write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    about = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moesaic": moesaic.__version__,
        "model": arguments.model.name,
        "samples": arguments.samples,
        "window": arguments.window,
        "preset": arguments.preset,
        "data": [Path(source).name for source in arguments.data],
        "evaluation": f"{TEXT}, {arguments.windows} windows of 1024 tokens",
    }
    write_rows(RESULTS / f"{arguments.results}.json", {"about": about, "rows": rows})
    lines = [
        "# Recovery",
        "",
        f"{about['model']}: {arguments.samples} samples of {arguments.window} tokens, preset `{arguments.preset}` of "
        f"`moesaic tune`; perplexity on {about['evaluation']}; ratio to dense with its 95 % interval.",
        "",
        "| conversion | architecture | dense | converted | ratio | tuned | ratio | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = row["before"], row["after"]
        lines.append(
            f"| {row['case']} | {row['target']} | {row['dense']:.2f} | {before['value']:.2f} | {_ratio(before)} "
            f"| **{after['value']:.2f}** | {_ratio(after)} | {row['tune']['seconds'] / 60:.0f} min |"
        )
    text = ", ".join(about["data"])
    lines += ["", f"Text: {text}. {about['machine']}, torch {about['torch']}. Made by `benchmarks/recovery.py`.", ""]
    (RESULTS / f"{arguments.results}.md").write_text("\n".join(lines))


def _ratio(row: dict[str, Any]) -> str:
    return Comparison(**row["ratio_to_dense"]).shown()


if __name__ == "__main__":
    main()

"""Conversions of a large model: time and peak memory beside what `plan` forecasts, and the page made of them.

    python -m benchmarks.scale run MODEL WORK LOG [--memory 10GB] [--only mlpmoe cmoe] [--threads 2]
    python -m benchmarks.scale page LOG... [--results docs/results]
    python -m benchmarks.scale costs        # the table of docs/scale.md, from configs alone

Every case runs in a process of its own and adds a line of JSON to LOG. A case that LOG has already is left out, and one
that was interrupted goes on where it was. Conversions are deleted when they are measured, as they are large.

Memory is anonymous: what a process has of its own, without pages of files, sampled 50 times a second (Linux). Seconds
are wall-clock ones; beside them stand those that the processor worked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name

from moesaic.durable import append_line, replace_text

CASES: dict[str, dict[str, Any]] = {
    "mlpmoe": {"method": "mlpmoe", "options": {"branches": 8}},
    "random": {"method": "random", "options": {"layout": "S3A3E8"}},
    "llama_moe": {"method": "llama_moe", "options": {"layout": "S3A3E8"}},
    "moefication": {"method": "moefication", "options": {"layout": "S3A3E8"}},
    "neuron_experts": {"method": "neuron_experts", "options": {"active": 0.5}},
    "static": {"method": "static", "options": {"active": 0.75}},
    "cmoe": {"method": "cmoe", "options": {"layout": "S3A3E8"}},
    "token_clusters": {"method": "token_clusters", "options": {"split": "union", "active": 0.75}},
    "secret_moe": {"method": "secret_moe", "options": {"steps": 20}},
    "tomoe": {"method": "tomoe", "options": {"train": {"steps": 4, "batch": 1, "held_out": 1}}},
}
LARGE = ("mlpmoe", "neuron_experts", "static", "cmoe", "token_clusters")
_WITHOUT_TEXT = ("mlpmoe", "neuron_experts")
"""What is run by default; the others on request."""
_EVERY = 0.02


class PeakMemory:
    """The largest anonymous memory of this process within a block, in bytes; 0 where the system does not tell."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file holds."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure(name: str, model: Path, out: Path, tokens: int, memory: str | None, threads: int) -> dict[str, Any]:
    """Forecast a conversion, do it, and delete it."""
    import torch

    import moesaic
    from moesaic.cli.console import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    settings = {**CASES[name], "target": "moesaic", "calibration": {"tokens": tokens}}
    if memory is not None:
        settings["memory"] = memory
    forecast = moesaic.plan(model, settings)
    begin, worked = time.monotonic(), time.process_time()
    with PeakMemory() as watched:
        done = moesaic.convert(model, out, settings=settings)
    seconds, worked = time.monotonic() - begin, time.process_time() - worked
    shutil.rmtree(done.output)
    return {
        "case": name,
        "model": model.name,
        "tokens": tokens,
        "memory": memory,
        "threads": threads,
        "machine": cpu_name(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(worked, 1),
        "peak_bytes": watched.peak,
        "forecast_seconds": forecast.seconds,
        "forecast_bytes": forecast.peak_bytes,
        "layers": forecast.layers,
        "d_model": forecast.d_model,
        "d_ff": forecast.d_ff,
    }


def run(arguments: argparse.Namespace) -> None:
    """All cases that the log lacks, one after the other."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or LARGE:
        key = {"case": name, "model": arguments.model.name, "tokens": arguments.tokens, "memory": arguments.memory}
        if any(key.items() <= row.items() for row in read(arguments.log)):
            continue
        given = (name, arguments.model, arguments.work / name, arguments.tokens, arguments.memory, arguments.threads)
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                row = pool.submit(measure, *given).result()
        except Exception as error:  # the other cases are worth their lines; this one is tried again next time
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        append_line(arguments.log, json.dumps(row))
        print(json.dumps(row), flush=True)


def read(log: Path) -> list[dict[str, Any]]:
    """The rows of a log; none where it is missing."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def page(rows: list[dict[str, Any]]) -> str:
    """docs/results/scale.md."""
    head = "model, layers x width x neurons|case|tokens|memory asked for|peak, GB|forecast, GB|off"
    columns = f"{head}|minutes|of processors|forecast|off".split("|")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        shape = f"{row['model']}, {row['layers']} x {row['d_model']} x {row['d_ff']}"
        found, told = row["peak_bytes"], row["forecast_bytes"]
        took, thought = row["seconds"] / 60, row["forecast_seconds"] / 60
        cells = [shape, row["case"], row["tokens"], row["memory"] or "-", f"{found / 1e9:.2f}", f"{told / 1e9:.2f}"]
        cells += [_off(told, found), f"{took:.1f}", f"{row['cpu_seconds'] / 60:.1f}"]
        cells += [f"{thought:.1f}", _off(thought, took)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    where = sorted({f"{row['machine']}, {row['threads']} threads" for row in rows})
    return "\n".join(
        [
            "# Conversions of large models",
            "",
            f"{'; '.join(where)}. Written by `python -m benchmarks.scale page`. Each case ran once, in a process of",
            "its own. Memory is anonymous memory at its peak, without pages of files. `off` is forecast over measured,",
            "less 1. Minutes of processors are those of all cores; where they are far below the minutes times the",
            "threads, disks or other work were waited for.",
            "",
            *lines,
            "",
        ]
    )


def costs() -> str:
    """The tables of docs/scale.md, from `plan` on configs without weights."""
    head = [
        "model",
        "method",
        "tokens",
        "FLOP",
        "weights, GB",
        "host memory, GB",
        "GPU memory, GB",
        "output, GB",
        "2 cores, hours",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for case in LARGE:
                for tokens in (2048, 16384):
                    lines.append(_cost(model, case, Path(folder), tokens))
                    if case in _WITHOUT_TEXT:
                        break
    return "\n".join(lines)


def _cost(model: str, case: str, folder: Path, tokens: int) -> str:
    import moesaic
    from moesaic.jobs.pace import PER_CORE

    settings = {**CASES[case], "target": "moesaic", "calibration": {"tokens": tokens, "compute_dtype": "bfloat16"}}
    told = moesaic.plan(folder, settings)
    hours = (told.operations / (2e9 * PER_CORE["float32"]) + 12 * told.ffn_parameters / 1e9) / 3600
    cells = [model, case, "-" if case in _WITHOUT_TEXT else f"{tokens:,}", f"{told.operations:.1e}"]
    cells += [f"{size / 1e9:.1f}" for size in (told.mapped_bytes, told.peak_bytes, told.device_bytes)]
    return f"| {' | '.join([*cells, f'{told.output_bytes / 1e9:.0f}', f'{hours:.1f}'])} |"


def _off(told: float, found: float) -> str:
    return f"{told / found - 1:+.0%}" if found else "-"


def _llama(layers: int, d_model: int, d_ff: int, heads: int, vocabulary: int, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


CONFIGS = {
    "8B": _llama(32, 4096, 14336, 32, 128256, "llama"),
    "32B": _llama(64, 5120, 27648, 40, 152064, "qwen2"),
    "70B": _llama(80, 8192, 28672, 64, 128256, "llama"),
}
"""Shapes of Llama-3.1-8B, Qwen2.5-32B and Llama-3.1-70B."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("model", type=Path)
    runs.add_argument("work", type=Path, help="folder for conversions while they are measured")
    runs.add_argument("log", type=Path, help="JSON lines, one per finished case")
    runs.add_argument("--memory", help="as convert takes it, such as 10GB")
    runs.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    runs.add_argument("--only", nargs="+", choices=list(CASES))
    runs.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    pages = verbs.add_parser("page")
    pages.add_argument("logs", type=Path, nargs="+")
    pages.add_argument("--results", type=Path, default=Path("docs/results"))
    verbs.add_parser("costs")
    arguments = parser.parse_args()
    if arguments.verb == "costs":
        print(costs())
        return
    if arguments.verb == "run":
        run(arguments)
        return
    rows = [row for log in arguments.logs for row in read(log)]
    replace_text(arguments.results / "scale.md", page(rows))


if __name__ == "__main__":
    main()

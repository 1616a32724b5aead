"""The map: perplexity over dense against bytes per token in the FFNs, with what a user would take instead.

    python -m benchmarks.map MODEL WORK [--rows int8 low4@50] [--texts WikiText-2 C4] [--window 128] [--noise] [--list]
    python -m benchmarks.map MODEL WORK --rows dense low4@50 --questions 300
    python -m benchmarks.map MODEL WORK --page

WORK/rows.jsonl gets a line for every row and text as soon as it is measured. What is there is not measured again, so
that an interrupted run goes on. Another calibration text needs another WORK. --page writes docs/results/map_MODEL.json,
.md and .png from all lines, and from compare_MODEL.json beside them. --questions answers so many questions of each of
lm-eval's tasks in place of reading texts, into WORK/tasks.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare.leak import shared_runs
from benchmarks.compare.table import mean_accuracy
from benchmarks.compare.tasks import data_folder
from benchmarks.map import tasks
from benchmarks.map.measure import TEXTS, Bench, Setting
from benchmarks.map.page import write_page
from benchmarks.map.rows import BY_KEY, ROWS, Row
from benchmarks.rows import read_lines

from moesaic.anatomy import read_anatomy
from moesaic.calibration.config import CalibrationConfig, check_sources
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.console import fail, quiet_libraries, say
from moesaic.durable import append_line, replace_text
from moesaic.errors import InputError, MoesaicError
from moesaic.options import build

CALIBRATION_WINDOW = 512
"""Tokens per calibration window: short, so that the few tokens for thresholds are of several texts."""
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, or write the page; what cannot work ends it with one line before any work."""
    try:
        _main(_parser().parse_args(argv))
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _main(arguments: argparse.Namespace) -> None:
    if arguments.list:
        print("\n".join(f"{row.key}  {row.label}" for row in ROWS))
        return
    file = arguments.work / "rows.jsonl"
    if arguments.page:
        protocol = arguments.work / "protocol.json"
        if not protocol.exists():
            raise InputError(f"{arguments.work} holds no measured rows", "measure first: leave out --page")
        about = json.loads(protocol.read_text(encoding="utf-8")) | {"machine": machine()}
        about["model"] = arguments.name or about["model"]
        answers = read_lines(arguments.work / tasks.FILE)
        say(str(write_page(about, read_lines(file), arguments.model, arguments.results, answers)))
        return
    rows = [BY_KEY[key] for key in arguments.rows or BY_KEY]
    gated = read_anatomy(Checkpoint(arguments.model).config).gated
    rows = [row for row in rows if gated or not row.reference.gated_only]
    calibration = {"sources": arguments.calib, "tokens": arguments.tokens, "window": CALIBRATION_WINDOW}
    calibration |= {"compute_dtype": arguments.dtype}
    config = build(CalibrationConfig, calibration, "calibration")
    check_sources(config)
    protocol = _protocol(arguments.work, arguments.name or arguments.model.name, config)
    if arguments.questions is not None:
        _answer(arguments, rows, config, protocol)
        return
    setting = Setting(arguments.window, _windows(arguments), arguments.noise)
    done = {key_of(record) for record in read_lines(file)}
    missing = {
        row.key: [text for text in arguments.texts if key_of(_asked(row, text, setting)) not in done] for row in rows
    }
    wanted = [row for row in rows if missing[row.key]]
    if wanted:
        torch.set_num_threads(arguments.threads)
        quiet_libraries()
        bench = Bench(arguments.model, config, setting.noise)
        for text in arguments.texts:
            if shared := shared_runs(bench.calibration_ids(), bench.windows(text, setting)):
                raise InputError(
                    f"{text} is evaluated and calibrated on: {shared} runs of tokens", "give other --calib"
                )
        arguments.work.mkdir(parents=True, exist_ok=True)
        replace_text(arguments.work / "protocol.json", f"{json.dumps(protocol)}\n")
        replace_text(file, "".join(f"{json.dumps(record)}\n" for record in read_lines(file)))
        _measure(bench, setting, [(row, missing[row.key]) for row in wanted], file)


def _answer(
    arguments: argparse.Namespace, rows: Sequence[Row], config: CalibrationConfig, protocol: dict[str, Any]
) -> None:
    """Append a line for each row whose questions are not answered yet."""
    data_folder()  # says what is missing
    file, limit = arguments.work / tasks.FILE, arguments.questions
    done = {(record["row"], record["limit"]) for record in read_lines(file)}
    wanted = [row for row in rows if (row.key, limit) not in done]
    if not wanted:
        return
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    bench = Bench(arguments.model, config)
    arguments.work.mkdir(parents=True, exist_ok=True)
    replace_text(arguments.work / "protocol.json", f"{json.dumps(protocol)}\n")
    for number, row in enumerate(wanted, start=1):
        record = tasks.answered(bench, row, limit, arguments.work)
        append_line(file, json.dumps(record))
        say(f"{number}/{len(wanted)}  {row.key}: {mean_accuracy(record):.1%} right, {record['seconds']} s")


def _measure(bench: Bench, setting: Setting, wanted: Sequence[tuple[Row, Sequence[str]]], file: Path) -> None:
    """Append a line for each row and text to ``file``."""
    for number, (row, texts) in enumerate(wanted, start=1):
        for record in bench.measure(row, setting, texts):
            append_line(file, json.dumps(record))
            value, seconds = record["perplexity"]["value"], record["seconds"]
            say(f"{number}/{len(wanted)}  {row.key} on {record['text']}: perplexity {value:.3f}, {seconds} s")


def key_of(record: dict[str, Any]) -> tuple[str, str, int, int, bool]:
    """What was measured: row, text, tokens per window, windows, noise."""
    return (record["row"], record["text"], record["window"], record["windows"], record["noise"])


def _asked(row: Row, text: str, setting: Setting) -> dict[str, Any]:
    shared = {"window": setting.window, "windows": setting.windows[text], "noise": setting.noise}
    return {"row": row.key, "text": text, **shared}


def _windows(arguments: argparse.Namespace) -> dict[str, int]:
    """Windows of each text: WikiText-2 has most, the others half or a quarter of them, at least two."""
    parts = {"WikiText-2": 1, "C4": 2}
    return {text: max(2, arguments.windows // parts.get(text, 4)) for text in TEXTS}


def _protocol(work: Path, model: str, config: CalibrationConfig) -> dict[str, Any]:
    """What all rows of the folder share. Raises InputError if others there were measured otherwise."""
    sources = [f"{Path(source.name).name}={source.weight:g}" for source in config.expanded()]
    asked = {"model": model, "calibration": {"sources": sources, "tokens": config.tokens, "seed": config.seed}}
    asked |= {"dtype": config.compute_dtype}
    file = work / "protocol.json"
    if file.exists() and (kept := json.loads(file.read_text(encoding="utf-8"))) != asked:
        differs = next(key for key in asked if kept.get(key) != asked[key])
        raise InputError(f"{work} holds rows of another {differs}: {kept.get(differs)}", "give another WORK")
    return asked


def machine() -> str:
    """Where and with what the figures were made."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("moesaic", "torch", "transformers"))
    return f"{platform.machine()}; {packages}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("work", type=Path, help="folder of the measured rows")
    parser.add_argument("--name", help="of the model on the page; default its folder's")
    parser.add_argument("--rows", nargs="+", choices=list(BY_KEY), metavar="ROW", help="see --list; default all")
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--window", type=int, default=1024, help="tokens per window")
    parser.add_argument("--windows", type=int, default=8, help="of WikiText-2; C4 has half, the others a quarter")
    parser.add_argument("--questions", type=int, help="of each task: answer these in place of reading texts")
    parser.add_argument("--noise", action="store_true", help="add one step of a 4-bit grid to the weights, as noise")
    parser.add_argument("--calib", nargs="+", default=["wikitext=2", "wiki=1"], help="texts or files, see convert")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all that is computed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--page", action="store_true", help="write the page and stop")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    return parser


if __name__ == "__main__":
    main()

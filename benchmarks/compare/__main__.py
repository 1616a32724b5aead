"""Every method and control at the same active fraction: one model, one calibration text, the same windows and tasks.

    python -m benchmarks.compare MODEL WORK [--fractions 75 50] [--only clusters cmoe] [--tasks --limit 50] [--list]

WORK keeps one JSON per finished case, which is not repeated; an interrupted case is begun again. Tasks may be asked for
later: they are added to the cases named, on conversions kept by --keep or made again. Another model, text, number of
tokens or windows needs another WORK. docs/results/compare_MODEL.{json,md,png} are written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.compare.cases import LEFT_OUT, RECIPES, Case, Shape, cases, percent
from benchmarks.compare.leak import refuse_leak
from benchmarks.compare.measure import Protocol, in_child
from benchmarks.compare.plot import draw
from benchmarks.compare.table import MAIN, comparisons, markdown
from benchmarks.compare.tasks import DATA_SETS, data_folder
from benchmarks.rows import write_rows
from transformers import AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.calibration.config import CalibrationConfig, check_sources
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.console import fail, say
from moesaic.durable import replace_text
from moesaic.errors import InputError, MoesaicError
from moesaic.evaluate.comparison import Comparison
from moesaic.options import build
from moesaic.options.device import find_device

FRACTIONS = ("87.5", "75", "62.5", "50", "25")
RESULTS = Path(__file__).parents[2] / "docs" / "results"
Runner = Callable[[Case, Protocol, Path, bool, dict[str, Any]], dict[str, Any]]


def main(argv: Sequence[str] | None = None, run: Runner = in_child) -> None:
    """The cases in order, the page after each; what cannot work ends it with one line before any work."""
    arguments = _parser().parse_args(argv)
    try:
        _main(arguments, run)
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _main(arguments: argparse.Namespace, run: Runner) -> None:
    protocol = _protocol(arguments)
    anatomy = read_anatomy(Checkpoint(arguments.model).config)
    shape = Shape(anatomy.num_layers, anatomy.d_ff, anatomy.gated)
    wanted, reasons = cases(shape, arguments.fractions, arguments.leading, arguments.only)
    if arguments.list:
        for case in wanted:
            print(f"{case.key}  {'' if case.settings is None else json.dumps(case.settings)}")
        for key, reason in {**reasons, **LEFT_OUT}.items():
            print(f"not {key}: {reason}")
        return
    refuse_leak(AutoTokenizer.from_pretrained(protocol.model), protocol)
    published = _check_work(arguments.work, protocol)
    for key, reason in reasons.items():
        say(f"not {key}: {reason}")
    for number, case in enumerate(wanted, start=1):
        file = arguments.work / f"{case.key}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if known and known.get("options", {}) != case.options():
            say(f"{case.key}: its options have other defaults now; it is measured anew")
            known = {}
        if not known or (protocol.tasks and "tasks" not in known):
            say(f"{number}/{len(wanted)}  {case.key} begins")
            record = run(case, protocol, arguments.work.resolve(), arguments.keep, known)
            write_rows(file, record)
        rows = write_page(arguments.work, published, shape, arguments.results)
        row = next(row for row in rows if (row["case"], row["fraction"]) == (case.name, float(case.fraction)))
        print(f"{number}/{len(wanted)}  {case.key}: {_figures(row)}", flush=True)


def write_page(work: Path, protocol: Protocol, shape: Shape, results: Path) -> list[dict[str, Any]]:
    """Write compare_MODEL.json, .md and .png from all finished cases in ``work``; returns the rows, dense first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*@*.json"))]
    rows = comparisons(records)
    fractions = sorted({Fraction(row["fraction"]).limit_denominator(1000) for row in rows[1:]}, reverse=True)
    current, reasons = cases(shape, fractions, protocol.leading)
    name = Path(protocol.model).name
    calibration = protocol.calibration  # the page is published: files by their names
    about = protocol.to_dict() | {"model": name, "machine": machine()}
    about["calibration"] = calibration | {"sources": [Path(source).name for source in calibration["sources"]]}
    about["older"] = older_options(records, current)
    everything = {"about": about, "rows": rows, "inexpressible": reasons}
    write_rows(results / f"compare_{name}.json", everything)
    replace_text(results / f"compare_{name}.md", markdown(about, rows, reasons))
    draw(rows, name, results / f"compare_{name}.png")
    return rows


def older_options(records: Sequence[dict[str, Any]], current: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Options of cases that were measured when these had other defaults than now, by the case's key."""
    now = {case.key: case.options() for case in current}
    older = {}
    for record in records:
        key = f"{record['case']}@{percent(Fraction(record['fraction']).limit_denominator(1000))}"
        was = record.get("options", {})
        changed = {n: v for n, v in was.items() if now.get(key, {}).get(n) != v}
        changed |= {n: "not there" for n in now.get(key, {}) if n not in was}
        older |= {key: changed} if changed else {}
    return older


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("work", type=Path, help="folder for finished cases and for conversions while they are needed")
    parser.add_argument("--fractions", nargs="+", type=_fraction, default=[_fraction(text) for text in FRACTIONS])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), metavar="CASE", help=", ".join(RECIPES))
    parser.add_argument("--calib", nargs="+", default=["wikitext=2", "wiki=1"], help="texts or files, see convert")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=1024, help="tokens per evaluation window")
    parser.add_argument("--windows", type=int, default=16, help="windows of WikiText-2 test; C4 has half as many")
    parser.add_argument("--leading", type=int, default=3, help="layers that the -lead cases leave dense")
    parser.add_argument("--tasks", nargs="*", choices=list(DATA_SETS), help="task accuracy; without names all of them")
    parser.add_argument("--limit", type=int, help="first questions of each task; default all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    for option, what in {"--dtype": "texts", "--task-dtype": "tasks"}.items():
        dtypes = ("auto", "float32", "bfloat16")
        parser.add_argument(option, choices=dtypes, default="auto", help=f"in evaluation on {what}; auto: the files'")
    parser.add_argument("--device", default="auto", help="where all is computed: auto, cpu, cuda, cuda:1, xpu, mps")
    parser.add_argument("--keep", action="store_true", help="keep the conversions")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--list", action="store_true", help="show the cases, and what cannot be one, and stop")
    return parser


def _fraction(text: str) -> Fraction:
    try:
        fraction = Fraction(text) / 100
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage") from None
    if not 0 < fraction < 1:
        raise argparse.ArgumentTypeError(f"{text} % is not between 0 and 100")
    return fraction


def _protocol(arguments: argparse.Namespace) -> Protocol:
    """The protocol asked for. Raises InputError for texts that are missing or that the evaluation reads."""
    calibration = {"sources": arguments.calib, "tokens": arguments.tokens}
    config = build(CalibrationConfig, calibration, "calibration")
    check_sources(config)
    if any(source.name == "c4" for source in config.expanded()):
        raise InputError("calibration on the C4 sample, which is evaluated on", "leave c4 and mix out of --calib")
    tasks = () if arguments.tasks is None else tuple(arguments.tasks or DATA_SETS)
    if tasks:
        data_folder()
    return Protocol(
        model=str(arguments.model.expanduser().resolve()),
        calibration=calibration,
        seed=arguments.seed,
        window=arguments.window,
        windows=arguments.windows,
        c4_windows=max(1, arguments.windows // 2),
        leading=arguments.leading,
        tasks=tasks,
        limit=arguments.limit,
        threads=arguments.threads,
        dtype=arguments.dtype,
        task_dtype=arguments.task_dtype,
        device=str(find_device(arguments.device)),
    )


def _check_work(work: Path, protocol: Protocol) -> Protocol:
    """The protocol of the folder's cases, which is written there. Raises InputError if they were measured otherwise.

    Threads may change: they only change the seconds. Tasks may be left out, or be new.
    """
    file = work / "protocol.json"
    if file.exists():
        kept, asked = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(protocol.to_dict()))
        kept = {"dtype": "auto", "task_dtype": "auto", "device": "cpu"} | kept  # older folders do not say
        free = {"threads"} if kept["tasks"] and asked["tasks"] else {"threads", "tasks", "limit", "task_dtype"}
        changed = [name for name, value in asked.items() if value != kept.get(name) and name not in free]
        if changed:
            raise InputError(
                f"{work} holds cases of another protocol: {', '.join(changed)} differ", "give another WORK folder"
            )
        if not protocol.tasks:
            kept_tasks = {"tasks": tuple(kept["tasks"]), "limit": kept["limit"], "task_dtype": kept["task_dtype"]}
            protocol = replace(protocol, **kept_tasks)
    write_rows(file, protocol.to_dict())
    return protocol


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("moesaic", "torch", "transformers"))
    return f"{platform.machine()}; {packages}"


def _figures(row: dict[str, Any]) -> str:
    texts = (f"{name} {table['value']:.2f}" for name, table in row["perplexity"].items())
    parts = [", ".join(texts), f"{row['size']['parameters'] / 1e6:.1f} M parameters"]
    if "ratio_to_dense" in row:
        parts.insert(1, f"{Comparison(**row['ratio_to_dense'][MAIN]).shown()} x dense")
        parts.append(f"{row['conversion']['seconds']:.0f} s to convert")
    if "accuracy" in row:
        parts.append(f"tasks {row['accuracy']['mean']:.1%}")
    return ", ".join([*parts, f"{sum(row['seconds'].values()):.0f} s to evaluate"])


if __name__ == "__main__":
    main()

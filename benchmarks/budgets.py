"""One conversion, several budgets: its experts at other prices, each set on text of the kind that is then read.

    python -m benchmarks.compare MODEL WORK --fractions 75 50 --only union-lead refit-lead --keep [...]
    python -m benchmarks.budgets WORK [--cases union-lead@75 union-lead@50] [--budgets 75 62.5 50] [--tokens 8192]

WORK is the comparison's folder, with conversions whose experts have widths of their own. For each of the comparison's
texts and each share of all FFN neurons, `moesaic convert --blueprint --budget` gives them the price at which other text
of the same kind uses that share: what follows the evaluated windows in the same text. Text of the calibration would not
do, as experts are cheapest for the tokens that built them. Beside it stands the refitted control with that share, where
WORK has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare.__main__ import RESULTS, machine
from benchmarks.compare.measure import TEXTS, Protocol, converted_share, evaluated, of_whole_model
from benchmarks.compare.table import Record, perplexity_of
from benchmarks.rows import write_rows
from torch import Tensor
from transformers import AutoTokenizer

from moesaic.adjust.budget import check_budget
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.samples import evaluation_text, sample_text
from moesaic.checkpoint.loading import load_model
from moesaic.cli.console import fail, quiet_libraries, say
from moesaic.durable import replace_text
from moesaic.errors import InputError, MoesaicError
from moesaic.evaluate.activity import counting
from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import perplexity
from moesaic.jobs.convert import convert

CONTROL = "refit-lead"


@dataclass(frozen=True)
class Bench:
    """The comparison's folder and protocol, and what is evaluated."""

    work: Path
    protocol: Protocol
    tokens: int
    tokenizer: Any
    windows: Mapping[str, Tensor]

    def record(self, key: str) -> Record | None:
        """A finished case of the comparison."""
        file = self.work / f"{key}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def name_of(self, text: str) -> str:
        """The perplexity's, as the comparison reports it."""
        return (self.record("dense@100") or {})["perplexity"][text]["name"]

    def against(self, record: Record, text: str, key: str) -> dict[str, Any] | None:
        """Perplexity over that of a case, paired over windows."""
        other = self.record(key)
        return None if other is None else compare(perplexity_of(record, text), perplexity_of(other, text)).to_dict()


def main() -> None:
    """All budgets of all conversions named, the page after each; what cannot work ends it with one line."""
    try:
        _main(_arguments())
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _main(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    bench = _bench(arguments.work.resolve(), arguments.tokens)
    known = {case: _checked(bench, case, arguments.budgets) for case in arguments.cases}
    rows: list[dict[str, Any]] = []
    for case, text in itertools.product(arguments.cases, TEXTS):
        planned = {"case": case, "text": text, "asked": None, "used": known[case]["active_on"][text]}
        rows.append(planned | _ratios(bench, known[case], text, None))
        for percent in arguments.budgets:
            rows.append(_at(bench, case, text, percent))
            say(_line(rows[-1]))
            _write(bench, rows, arguments.results)


def _bench(work: Path, tokens: int) -> Bench:
    """Raises InputError where there is no comparison."""
    for file in (work / "protocol.json", work / "dense@100.json"):
        if not file.exists():
            raise InputError(f"{work} is no folder of a comparison: {file.name} is missing", "run benchmarks.compare")
    protocol = Protocol(**json.loads((work / "protocol.json").read_text(encoding="utf-8")))
    torch.set_num_threads(protocol.threads)
    tokenizer = AutoTokenizer.from_pretrained(protocol.model)
    return Bench(work, protocol, tokens, tokenizer, evaluated(tokenizer, protocol))


def _checked(bench: Bench, case: str, percents: list[float]) -> Record:
    """The record of a conversion that can have these budgets. Raises InputError for another."""
    known = bench.record(case)
    if known is None or not (bench.work / case).exists():
        raise InputError(f"{bench.work} has no conversion {case}", "make it by benchmarks.compare --keep")
    made = Blueprint.load(bench.work / case)
    check_budget(made.sites)
    for percent in percents:
        _share(bench, made, percent)
    return known


def _share(bench: Bench, made: Blueprint, percent: float) -> float:
    """Of the converted FFNs, where ``percent`` is of all. Raises InputError where the dense layers have more."""
    active = 1 - (1 - percent / 100) / converted_share(made, bench.protocol)
    if active <= 0:
        raise InputError(f"{percent:g} % of all FFNs is less than the dense layers have", "choose a larger share")
    return active


def _at(bench: Bench, case: str, text: str, percent: float) -> dict[str, Any]:
    """Another budget of a conversion, measured on one text; ``percent`` of the whole model's FFNs."""
    budget = _share(bench, Blueprint.load(bench.work / case), percent)
    price = bench.work / "price.txt"
    price.write_text(_price_text(bench, text), encoding="utf-8")
    folder = bench.work / "budget"
    shutil.rmtree(folder, ignore_errors=True)
    calibration = {"sources": [str(price)], "tokens": bench.tokens}
    settings = {"budget": budget, "calibration": calibration, "target": "moesaic"}
    done = convert(bench.protocol.model, folder, blueprint=bench.work / case, settings=settings, restart=True)
    model = load_model(folder, bench.protocol.dtype)
    with counting(model) as activity:
        value = perplexity(model, bench.windows[text], bench.name_of(text))
    used = of_whole_model(activity, done.blueprint, bench.protocol)
    shutil.rmtree(folder)
    record = {"perplexity": {text: value.to_dict()}}
    seconds = done.results["conversion"]["seconds"]
    row = {"case": case, "text": text, "asked": percent / 100, "used": used, "seconds": seconds}
    return row | _ratios(bench, record, text, percent)


def _price_text(bench: Bench, text: str) -> str:
    """What follows the evaluated windows."""
    whole = evaluation_text() if text == "WikiText-2" else sample_text("c4")
    ids = bench.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    evaluated_tokens = bench.windows[text].numel()
    return bench.tokenizer.decode(ids[evaluated_tokens : evaluated_tokens + 2 * bench.tokens])


def _ratios(bench: Bench, record: Record, text: str, percent: float | None) -> dict[str, Any]:
    control = None if percent is None else bench.against(record, text, f"{CONTROL}@{percent:g}")
    value = perplexity_of(record, text).value
    return {"value": value, "over_dense": bench.against(record, text, "dense@100"), "over_control": control}


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [Comparison(**row[key]).shown() if row[key] else "" for key in ("over_dense", "over_control")]
    asked = "as it was planned" if row["asked"] is None else f"{row['asked']:.1%}"
    return [f"`{row['case']}`", row["text"], asked, f"{row['used']:.1%}", f"{row['value']:.2f}", *ratios]


def _line(row: dict[str, Any]) -> str:
    return ", ".join(cell for cell in _cells(row) if cell)


def _write(bench: Bench, rows: list[dict[str, Any]], results: Path) -> None:
    protocol, name = bench.protocol, Path(bench.protocol.model).name
    head = [
        "conversion",
        "text",
        "asked for",
        "used",
        "perplexity",
        "over dense",
        "over the refitted control with that share",
    ]
    lines = [
        f"# One conversion, several budgets: {name}",
        "",
        f"Conversions of the [comparison](compare_{name}.md) with their experts at other prices "
        f"(`moesaic convert --blueprint --budget`): router and readout stay, and one price per FFN is set on "
        f"{bench.tokens} tokens of what follows the evaluated windows in the same text. Shares are of the neurons of "
        f"all FFNs. {protocol.windows} windows of WikiText-2 test, {protocol.c4_windows} of C4, {protocol.window} "
        "tokens each; ratios are paired over windows, with their 95 % interval.",
        "",
        f"{machine()}. Made by `python -m benchmarks.budgets`.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    write_rows(results / f"budgets_{name}.json", {"rows": rows})
    replace_text(results / f"budgets_{name}.md", "\n".join(lines) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the comparison")
    cases = ["union-lead@75", "union-lead@50"]
    parser.add_argument("--cases", nargs="+", default=cases, metavar="CASE", help="conversions in it that were kept")
    parser.add_argument("--budgets", nargs="+", type=float, default=[75.0, 62.5, 50.0], help="percent of all FFNs")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that set a price")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()

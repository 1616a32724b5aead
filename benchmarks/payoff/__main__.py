"""When does it pay? A dense model, quantised or pruned, beside its conversions, in the engines that people run.

    python -m benchmarks.payoff prepare WORK NAME=MODEL [--points dense-q8_0 copies-50-q8_0 ...]
    python -m benchmarks.payoff quality WORK NAME=MODEL [--windows 8] [--window 512]
    python -m benchmarks.payoff speed WORK NAME=MODEL ... [--minutes 11] [--threads 1 2]
    python -m benchmarks.payoff page WORK NAME=MODEL ... [--report docs/results/payoff]

Several models may be given. WORK/NAME has the conversions, the GGUF files and log.jsonl, which gets a line for every
point as soon as it is measured. What is there is not measured again, so an interrupted run goes on. ``speed`` wants an
idle machine; it shares its minutes out over models and engines. ``page`` writes REPORT.json, REPORT.md and a plot per
regime from what the logs have, and the page of advice. --list shows the points.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.payoff.page import write_page
from benchmarks.payoff.points import ENGINES, LLAMA_CPP, POINTS, TRANSFORMERS, Point, chosen
from benchmarks.payoff.prepare import Place, prepare
from benchmarks.payoff.quality import quality
from benchmarks.payoff.speed import speed

from moesaic.cli.console import fail, quiet_libraries, say
from moesaic.errors import InputError, MoesaicError

RESULTS = Path(__file__).parents[2] / "docs" / "results"
HOWTO = RESULTS.parent / "howto" / "payoff.md"
_WEIGHTS = {LLAMA_CPP: 5, TRANSFORMERS: 2}
"""Of the minutes, by how many points the engines have, about."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do one stage; what cannot work ends it with one line before any work."""
    try:
        _main(_parser().parse_args(argv))
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _main(given: argparse.Namespace) -> None:
    if given.list:
        print("\n".join(f"{key}  {point.label}" for key, point in POINTS.items()))
        return
    places = {name: Place(given.work / name, model) for name, model in map(_named, given.models)}
    if not places:
        raise InputError("no model is named", "give NAME=MODEL")
    quiet_libraries()
    points = chosen(given.points)
    if given.stage == "page":
        say(str(write_page(places, points, given.report, given.howto)))
        return
    torch.set_num_threads(given.threads[0])
    for place in places.values():
        if given.stage == "prepare":
            prepare(place, points, given.calib_tokens, say)
        if given.stage == "quality":
            quality(place, points, given.windows, given.window, say)
    if given.stage == "speed":
        _speeds(places, points, given)


def _speeds(places: dict[str, Place], points: Sequence[Point], given: argparse.Namespace) -> None:
    """Share the minutes out by what the models weigh."""
    engines = {engine: [p for p in points if p.engine == engine] for engine in ENGINES}
    runs = [
        (place, own, threads, _WEIGHTS[engine] * _stored(place) / threads)
        for place in places.values()
        for engine, own in engines.items()
        if own
        for threads in given.threads
    ]
    whole = sum(weight for *_, weight in runs)
    for place, own, threads, weight in runs:
        speed(place, own, threads, 60 * given.minutes * weight / whole, say)


def _stored(place: Place) -> float:
    """Bytes of the dense model, to which times are proportional, about."""
    return sum(file.stat().st_size for file in place.dense.glob("*.safetensors"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.payoff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("prepare", "quality", "speed", "page"))
    parser.add_argument("work", type=Path, help="folder of what is made and measured")
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="folders of dense models, in bf16")
    parser.add_argument("--points", nargs="+", choices=list(POINTS), metavar="POINT", help="see --list; default all")
    parser.add_argument("--calib-tokens", type=int, help="prepare: tokens of calibration; default those of the presets")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens per window, at most 512")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="speed: CPU threads, one run each")
    parser.add_argument("--minutes", type=float, default=11, help="speed: of all that is missing")
    parser.add_argument("--report", type=Path, default=RESULTS / "payoff", help="the page, without its ending")
    parser.add_argument("--howto", type=Path, default=HOWTO, help="the page of advice")
    parser.add_argument("--list", action="store_true", help="show the points and stop")
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_dir():
        raise InputError(f"cannot read {text!r}", "give NAME=FOLDER of a dense model")
    return name, Path(path)


if __name__ == "__main__":
    main()

"""The pay-off page: points are measured once and go on, fronts and intervals are what they claim, the page says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.payoff.__main__ import main
from benchmarks.payoff.child import InLlamaCpp
from benchmarks.payoff.cost import Weights, overhead, weights_of
from benchmarks.payoff.decide import fastest, guide, smallest
from benchmarks.payoff.log import Log
from benchmarks.payoff.measured import Found, Pace, Regime, clear, front
from benchmarks.payoff.points import CONVERSIONS, POINTS, chosen, copied_neurons

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.llama_cpp import available
from moesaic.evaluate.perplexity import Perplexity, of_windows
from moesaic.jobs.export_gguf import export_gguf
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
DECODE = Regime("decode", 1, 1)


@pytest.fixture(scope="module", name="dense")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("payoff") / "tiny", d_ff=128)


@pytest.fixture(scope="module", name="made")
def made_folder(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of work with two conversions, as the stage ``prepare`` leaves it."""
    work = tmp_path_factory.mktemp("work")
    (work / "tiny").mkdir()
    write(dense, plans_for(dense), work / "tiny" / "cmoe-50", "glm4_moe")
    moesaic.convert(dense, work / "tiny" / "neurons-50", method="neuron_experts", options={"active": 0.5})
    return work


def run(stage: str, dense: Path, work: Path, *more: str) -> list[dict[str, Any]]:
    """The lines of the log after a stage."""
    main([stage, str(work), f"tiny={dense}", *more])
    return Log(work / "tiny" / "log.jsonl").lines


# measuring


def test_a_finished_point_is_not_measured_again(dense: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "neurons-50").symlink_to(made / "tiny" / "neurons-50")
    protocol = ("--windows", "2", "--window", "64")
    first = run("quality", dense, tmp_path, "--points", "dense-bf16", *protocol)
    file = tmp_path / "tiny" / "log.jsonl"
    with file.open("a") as log:
        log.write('{"stage": "quality", "point": "neurons-50-bf16", "perp')  # as a crash leaves it
    both = run("quality", dense, tmp_path, "--points", "neurons-50-bf16", *protocol)
    assert both[: len(first)] == first
    assert [line["point"] for line in both] == ["dense-bf16", "neurons-50-bf16"]
    assert run("quality", dense, tmp_path, "--points", "neurons-50-bf16", *protocol) == both
    more = run("quality", dense, tmp_path, "--points", "neurons-50-bf16", "--windows", "3", "--window", "64")
    assert len(more) == len(both) + 2  # another protocol


@needs_llama_cpp
def test_from_files_to_the_pages(dense: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = ("--points", "dense-q8_0", "cmoe-50-q8_0", "neurons-50-bf16", "copies-50-q8_0")
    report, howto = tmp_path / "results" / "payoff", tmp_path / "howto" / "payoff.md"
    pages = (*points, "--report", str(report), "--howto", str(howto))
    exported = run("prepare", dense, made, *points)  # 16 experts of 32 neurons do not fit: the others go on
    assert [line["point"] for line in exported] == ["dense-f16", "dense-q8_0", "cmoe-50-q8_0"]
    run("quality", dense, made, *points, "--windows", "2", "--window", "64")
    assert "copies-50-q8_0.gguf is missing" in capsys.readouterr().err
    run("page", dense, made, *pages)
    before = report.with_suffix(".md").read_text()
    assert "* tiny: speed of all points." in before
    assert "* tiny: perplexity of copies-50-q8_0." in before
    assert "The speeds are not measured yet" in howto.read_text()
    assert not list(report.parent.glob("*.png"))

    lines = run("speed", dense, made, *points, "--minutes", "0.001", "--threads", "1")
    speeds = [line for line in lines if line["stage"] == "speed"]
    of_llama_cpp = ["dense-f16", "dense-q8_0", "cmoe-50-q8_0"]
    assert [line["point"] for line in speeds] == [*of_llama_cpp, "dense-bf16", "neurons-50-bf16"]
    for line in speeds:
        for kinds in line["batches"].values():
            for rounds in kinds.values():
                assert len(rounds["own"]) == len(rounds["base"]) == 2
                assert min(rounds["own"] + rounds["base"]) > 0
    assert run("speed", dense, made, *points, "--minutes", "0.001", "--threads", "1") == lines
    run("page", dense, made, *pages)
    after = report.with_suffix(".md").read_text()
    assert "* tiny: speed of copies-50-q8_0." in after
    assert after.count("Front: ") == 8  # two engines, prompts and decoding, one sequence and eight
    assert "overhead per layer" in after
    assert sorted(path.name for path in report.parent.glob("*.png")) == ["payoff_decode.png", "payoff_prefill.png"]
    assert "| either engine, prefill, 8 sequences, 1 thread |" in howto.read_text()
    entries = json.loads(report.with_suffix(".json").read_text())["tiny"]
    q8 = next(entry for entry in entries if entry["point"] == "dense-q8_0")
    assert q8["over_dense"]["ratio"] == pytest.approx(1, abs=0.02)
    assert q8["stored_megabytes"] == round((made / "tiny" / "dense-q8_0.gguf").stat().st_size / 1e6, 1)


@needs_llama_cpp
def test_sequences_of_a_batch_are_each_their_own(dense: Path, tmp_path: Path) -> None:
    file = export_gguf(dense, tmp_path / "tiny.gguf", "f32", check=False).output
    ids_BW = np.array([[5, 9, 14, 20, 3], [7, 7, 30, 2, 11]])
    many, one = (InLlamaCpp(str(file), threads=1, sequences=count, context=16) for count in (2, 1))
    together = [many.prefill(ids_BW)]
    for _ in range(3):
        together.append(many.step(together[-1][:, None]))
    for row, ids_W in enumerate(ids_BW):
        alone = [one.prefill(ids_W[None])]
        for _ in range(3):
            alone.append(one.step(alone[-1][:, None]))
        assert [int(tokens[0]) for tokens in alone] == [int(tokens[row]) for tokens in together]


def test_a_model_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quality", str(tmp_path), "tiny=nowhere"])
    assert "NAME=FOLDER" in capsys.readouterr().err


# points


def test_the_dense_models_to_compare_to_are_added() -> None:
    assert [point.key for point in chosen(["copies-50-q8_0"])] == ["dense-f16", "copies-50-q8_0"]
    assert [point.key for point in chosen(["union-50-bf16"])] == ["dense-bf16", "union-50-bf16"]
    assert [point.key for point in chosen(None)] == list(POINTS)


def test_copies_have_the_widest_experts_nearby() -> None:
    """Of 4,864 neurons 3,474 are asked for: 3,488 would leave experts of 32, as 109 is prime."""
    count = copied_neurons(Fraction(5, 7), 4864)
    assert count == 3456
    assert CONVERSIONS["copies-75"].used(24, 4864) == pytest.approx((3456 / 4864 * 21 + 3) / 24)


# what the figures say


def found(key: str, speed: tuple[float, float, float], nll: Sequence[float], base: Sequence[float]) -> Found:
    """A point of this pace (median, least, largest) and these losses per window of one predicted token."""

    def known(values: Sequence[float]) -> Perplexity:
        return of_windows("w", values, 2)

    pace = Pace(10 * speed[0], *speed)
    return Found(POINTS[key], known(nll), compare(known(nll), known(base)), 1.0, 0, 1.0, {DECODE: pace})


BASE = [2.0, 3.0, 2.5, 2.7]


def shifted(by: float, noise: float = 0.0) -> list[float]:
    return [loss + by + noise * sign for loss, sign in zip(BASE, (1, -1, 1, -1), strict=True)]


def test_the_front_has_what_nothing_beats() -> None:
    dense = found("dense-f16", (1, 1, 1), BASE, BASE)
    fast = found("dense-q4_k_m", (2, 1.9, 2.1), shifted(0.1), BASE)
    beaten = found("copies-50-q8_0", (1.5, 1.4, 1.6), shifted(0.2), BASE)
    better = found("dense-q8_0", (1.5, 1.4, 1.6), shifted(0.01), BASE)
    entries = [fast, beaten, dense, better]
    assert front(entries, DECODE) == [dense, better, fast]
    assert front([*entries, found("dense-q6_k", (2.5, 2.4, 2.6), shifted(-0.1), BASE)], DECODE)[0].point.dtype == "q6_k"


def test_clear_of_intervals() -> None:
    stock = found("copies-50-q8_0", (2, 1.9, 2.1), shifted(0.1), BASE)
    slower = found("dense-q8_0", (1.5, 1.4, 1.6), BASE, BASE)
    assert clear(stock, [stock, slower], DECODE)
    as_fast = found("dense-q4_0", (1.95, 1.8, 2.0), shifted(0.2, noise=0.01), BASE)  # loses more, surely
    assert clear(stock, [stock, slower, as_fast], DECODE)
    unsure = found("dense-q4_0", (1.95, 1.8, 2.0), shifted(0.2, noise=0.3), BASE)  # loses more, perhaps
    assert not clear(stock, [stock, slower, unsure], DECODE)
    nearly = found("dense-q8_0", (1.5, 1.4, 1.95), BASE, BASE)  # as fast in one round, and better
    assert not clear(stock, [stock, nearly], DECODE)


def test_the_answer_is_the_fastest_of_those_that_lose_little_enough() -> None:
    dense = found("dense-f16", (1, 1, 1), BASE, BASE)
    stock = found("copies-50-q8_0", (2, 1.9, 2.1), shifted(0.1), BASE)  # loses 10.5 %
    pruned = replace(found("static-50-q8_0", (1.8, 1.7, 1.9), shifted(0.15), BASE), stored_megabytes=0.5)
    entries = [dense, stock, pruned]
    answers = [fastest(entries, DECODE, loss) for loss in (0.05, 0.11, 0.5)]
    assert answers == [dense, stock, stock]
    assert fastest([stock], DECODE, 0.05) is None
    at_times_slower = found("cmoe-50-q8_0", (3, 0.9, 4), BASE, BASE)
    assert fastest([*entries, at_times_slower], DECODE, 0.5) is stock
    assert smallest(entries, 0.5) is pruned
    page = guide({"tiny": entries})
    row = next(line for line in page.splitlines() if line.startswith("| llama.cpp, decode"))
    assert row.count("**copies-50-q8_0** (2.00x)") == 2
    assert row.count("dense-f16 (1.00x)") == 2
    assert "* tiny, llama.cpp: 2 of 4." in page


def test_overhead_and_what_pays_for_it() -> None:
    """From times made of a known second per weight and overhead, both come back."""
    weights = Weights(ffn=1000, layers_in_all=40_000, head=10_000, layers=30, d_ff=1536)
    conversion = CONVERSIONS["cmoe-50"]
    per_weight, per_layer = 2e-6, 3e-4
    dense_time = per_weight * weights.read("decode")
    own_time = per_weight * weights.read("decode", 0.5) + per_layer * conversion.converted(30)
    rates = {"dense-q8_0": 1 / dense_time, "cmoe-50-q8_0": 1 / own_time}
    dense, own = (
        Found(POINTS[key], None, None, None, 0, None, {DECODE: Pace(rate, 1, 1, 1)}) for key, rate in rates.items()
    )
    cost = overhead(own, dense, DECODE, weights)
    assert cost.microseconds == pytest.approx(300)
    assert cost.pays_from == pytest.approx(per_layer / (per_weight * 0.5))
    assert cost.at_best == pytest.approx(50_000 / 35_000)
    even = Weights(round(cost.pays_from), 30 * round(cost.pays_from), 0, 30, 1536)  # an FFN of just that size
    even_time = per_weight * even.read("decode", 0.5) + per_layer * 30
    assert even_time == pytest.approx(per_weight * even.read("decode"), rel=1e-3)


def test_weights_are_those_of_the_checkpoint(dense: Path) -> None:
    weights = weights_of(dense)
    checkpoint = Checkpoint(dense)
    shapes = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names}
    ffn = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert weights.ffn == sum(int(np.prod(shapes[name])) for name in ffn)
    assert weights.head == int(np.prod(shapes["model.embed_tokens.weight"]))
    assert weights.layers_in_all + weights.head == sum(int(np.prod(shape)) for shape in shapes.values())

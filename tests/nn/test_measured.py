"""Paths chosen by what was measured on this machine: kept, refused where damaged, never for decisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.evaluate import path_times
from moesaic.evaluate.path_times import small_ffn
from moesaic.nn.moesaic_measured import LAYOUTS, TOKENS, at, keep, measured
from moesaic.nn.moesaic_paths import PATHS, PORTABLE, choose

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    measured.cache_clear()
    yield
    measured.cache_clear()


def taken(tokens: int) -> str:
    ffn = small_ffn(BF16)
    with torch.inference_mode():
        return choose(torch.zeros(tokens, 128, dtype=BF16), ffn).name


def keep_for(**named: str) -> Path:
    """Keep that packed experts are computed by ``rows``, but by others for numbers of tokens such as ``_64``."""
    names = tuple(named.get(f"_{tokens}", "rows") for tokens in TOKENS)
    return keep(dict.fromkeys(LAYOUTS, names), BF16, torch.get_num_threads())


def test_what_was_measured_decides_and_what_is_absent_or_damaged_does_not() -> None:
    by_table = [taken(tokens) for tokens in (1, 300)]
    file = keep_for(_1="masked", _256="fused", _512="sorted")
    assert [taken(tokens) for tokens in (1, 2, 300, 400, 5000)] == ["masked", "rows", "fused", "sorted", "rows"]
    kept = file.read_text()
    for damage in ("", "{}", "[]", '{"packed": ["rows"], "union": ["rows"]}', kept.replace('"fused"', "1")):
        file.write_text(damage)
        measured.cache_clear()
        assert [taken(tokens) for tokens in (1, 300)] == by_table
    file.write_text(kept.replace("masked", "no such path"))
    measured.cache_clear()
    assert taken(1) == by_table[0]
    assert [path.name for path in file.parent.glob("paths-*")] == [file.name]


def test_it_holds_for_one_dtype_and_number_of_threads_and_for_routed_experts() -> None:
    by_table = "rows"
    keep_for(_1="masked")
    threads = torch.get_num_threads()
    assert measured(BF16, threads) is not None
    assert measured(torch.float32, threads) is None
    assert measured(BF16, threads + 1) is None
    ffn = small_ffn(BF16)
    ffn.all_experts_on = True
    with torch.inference_mode():
        assert choose(torch.zeros(1, 128, dtype=BF16), ffn).name == by_table


def test_decisions_depend_on_no_measurement() -> None:
    ffn, x_TD = small_ffn(BF16), torch.zeros(300, 128, dtype=BF16)
    ffn.table = PORTABLE
    with torch.inference_mode():
        before = choose(x_TD, ffn).name
        keep_for()
        assert before == choose(x_TD, ffn).name == "sorted"


def test_the_nearest_number_counts() -> None:
    assert [TOKENS[at(tokens)] for tokens in (1, 3, 5, 6, 22, 90, 91, 10_000)] == [1, 4, 4, 8, 16, 64, 128, 2048]


def test_the_fastest_is_that_of_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_times, "WIDTHS", (32, 64))
    monkeypatch.setattr(path_times, "SECONDS", 0.0)
    asked: set[str] = set()

    def seconds(ffn: object, name: str, x_TD: torch.Tensor) -> float:
        asked.add(name)
        return 1.0 if name == ("sorted" if len(x_TD) > 16 else "fused") else 2.0

    monkeypatch.setattr(path_times, "_seconds", seconds)
    found = path_times.measure(BF16)
    assert asked == {row.path.name for row in PATHS if row.path.layout in LAYOUTS}
    assert found == dict.fromkeys(LAYOUTS, ("fused",) * 5 + ("sorted",) * 6)

"""Paths chosen by costs that were measured on this machine: kept, refused where damaged, never for decisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic.evaluate.path_costs import small_ffn
from moesaic.nn.moesaic_costs import ESTIMATES, TOKENS, Costs, Size, cost, keep, measured
from moesaic.nn.moesaic_paths import PORTABLE, choose

SLOW, FAST = (9.0,) * len(TOKENS), (1.0,) * len(TOKENS)
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


def keep_for(costs: Costs) -> Path:
    return keep(costs, BF16, torch.get_num_threads())


def test_what_was_measured_decides_and_what_is_absent_or_damaged_does_not() -> None:
    by_table = [taken(tokens) for tokens in (1, 300)]
    file = keep_for(Costs(FAST, SLOW, SLOW, 1.0, 1e9))  # the kernel is slow, and so is an expert's own call
    assert [taken(tokens) for tokens in (1, 300)] == ["masked", "masked"]
    keep_for(Costs(SLOW, FAST, SLOW, 1.0, 1.0))
    assert taken(300) == "rows"
    keep_for(Costs(SLOW, SLOW, FAST, 1.0, 1e9))
    assert [taken(tokens) for tokens in (1, 300)] == ["fused", "fused"]
    for damage in (
        "",
        "{}",
        '{"torch": [1], "rows": [1], "fused": [1], "copy": 1, "call": 1}',
        file.read_text().replace("9.0", "-9"),
    ):
        file.write_text(damage)
        measured.cache_clear()
        assert [taken(tokens) for tokens in (1, 300)] == by_table
    assert [path.name for path in file.parent.glob("costs-*")] == [file.name]


def test_costs_hold_for_one_dtype_and_number_of_threads() -> None:
    keep_for(Costs(SLOW, FAST, SLOW, 1.0, 1.0))
    threads = torch.get_num_threads()
    assert measured(BF16, threads) is not None
    assert measured(torch.float32, threads) is None
    assert measured(BF16, threads + 1) is None


def test_decisions_depend_on_no_measurement() -> None:
    ffn, x_TD = small_ffn(BF16), torch.zeros(300, 128, dtype=BF16)
    ffn.table = PORTABLE
    with torch.inference_mode():
        before = choose(x_TD, ffn).name
        keep_for(Costs(FAST, SLOW, SLOW, 1.0, 1e9))
        assert before == choose(x_TD, ffn).name == "sorted"


def test_costs_between_measured_numbers_and_estimates_of_known_sizes() -> None:
    table = tuple(float(tokens) for tokens in TOKENS)
    assert [cost(table, tokens) for tokens in (0.5, 1, 3, 100, 1024)] == [0.5, 1, 3, 100, 1024]
    costs = Costs(table, table, table, 1.0, 10.0)
    packed = Size("packed", True, 100, 20, 8, 10, 8, 3, 1 / 8)  # all experts chosen
    assert [ESTIMATES[name](packed, costs, 4) for name in ("every", "masked", "rows", "fused")] == [1200.0] * 4
    assert ESTIMATES["sorted"](packed, costs, 4) == ESTIMATES["fused_sorted"](packed, costs, 4) == 1200 + 80
    union = Size("union", True, 100, 0, 1, 50, 1, 3, 0.5)
    assert ESTIMATES["rows"](union, costs, 1) == pytest.approx(150)
    assert ESTIMATES["sorted"](union, costs, 4) == 3 * 50 * (4 + 1) + 10

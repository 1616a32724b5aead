"""Training data: every window once per epoch, another order each time, a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.errors import InputError
from moesaic.train.config import TrainConfig
from moesaic.train.data import TrainData, derived_seed, read_data
from tests.tiny_models import tiny_tokenizer
from tests.train.tasks import text


def test_every_epoch_has_every_window_once_in_another_order() -> None:
    data = TrainData(torch.arange(14)[:, None].expand(14, 3), torch.zeros(0, 3, dtype=torch.int64))
    rows = torch.cat([data.batch(step, 4)[0][:, 0] for step in range(7)])
    assert sorted(rows[:14].tolist()) == sorted(rows[14:].tolist()) == list(range(14))
    assert rows[:14].tolist() != rows[14:].tolist()


def test_a_batch_is_a_function_of_its_step_and_parts_do_not_change_it() -> None:
    data = text()
    ids_BW, index_B = data.batch(3, 8)
    assert torch.equal(ids_BW, text().batch(3, 8)[0])
    assert index_B.tolist() == list(range(24, 32))
    assert torch.equal(ids_BW, torch.cat([data.batch(6, 4)[0], data.batch(7, 4)[0]]))


def test_seeds_of_neighbours_differ() -> None:
    assert len({derived_seed(a, b) for a in range(10) for b in range(10)}) == 100


def test_held_out_windows_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"word{number}" for number in range(3000)))
    config = TrainConfig.model_validate(
        {"held_out": 5, "data": {"sources": [str(tmp_path / "text.txt")], "tokens": 640, "window": 32}}
    )
    data, _ = read_data(config, tiny_tokenizer())
    assert data.ids_NW.shape == (20, 32)
    assert data.held_out_HW.shape == (5, 32)
    seen = {tuple(row) for row in data.ids_NW.tolist()}
    assert not seen & {tuple(row) for row in data.held_out_HW.tolist()}
    clipped, notes = read_data(config, tiny_tokenizer(), max_positions=16)
    assert clipped.window == 16
    assert len(clipped.held_out_HW) == 5
    assert notes == ()


def test_the_fingerprint_knows_text_and_order() -> None:
    make: Callable[[int], TrainData] = lambda seed: text(seed=seed)  # noqa: E731
    assert make(1).fingerprint() == make(1).fingerprint() != make(2).fingerprint()
    ids_NW = text().ids_NW
    assert TrainData(ids_NW, ids_NW[:0], 1).fingerprint() != TrainData(ids_NW, ids_NW[:0], 2).fingerprint()


def test_no_training_text_is_refused() -> None:
    with pytest.raises(InputError, match="no training text"):
        TrainData(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))

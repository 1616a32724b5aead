"""The sensitivity of layers: equal to cutting a loaded model by hand, on tokens that did not choose the neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moesaic.adjust.sensitivity import WINDOW, cut_windows, measure_layers
from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.progress import Silent
from tests.tiny_models import build_tiny


class Counting(Silent):
    """Counts the steps announced and done."""

    def __init__(self) -> None:
        self.announced, self.done = 0, 0

    def start(self, label: str, total: int) -> None:
        self.announced += total

    def advance(self, detail: str = "") -> None:
        self.done += 1


@torch.inference_mode()
def by_hand(folder: Path, chosen_NW: torch.Tensor, measured_NW: torch.Tensor, layer: int, fraction: float) -> float:
    """KL of a transformers model whose weakest neurons in one layer are zeroed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model(input_ids=measured_NW).logits.log_softmax(-1)
    down = model.model.layers[layer].mlp.down_proj
    seen = []
    hook = down.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    model(input_ids=chosen_NW)
    hook.remove()
    energy_TF = (seen[0] * down.weight.norm(dim=0)).square()
    score_F = (energy_TF / energy_TF.sum(dim=1, keepdim=True)).mean(dim=0)
    weakest = score_F.argsort()[: len(score_F) - round(fraction * len(score_F))]
    down.weight[:, weakest] = 0
    actual = model(input_ids=measured_NW).logits.log_softmax(-1)
    return float(F.kl_div(actual.flatten(0, 1), expected.flatten(0, 1), reduction="batchmean", log_target=True))


def measured(folder: Path, windows: tuple[torch.Tensor, torch.Tensor]) -> list[dict[float, float]]:
    checkpoint, progress = Checkpoint(folder), Counting()
    anatomy = read_anatomy(checkpoint.config)
    found = measure_layers(checkpoint, anatomy, windows, (0.75, 0.5), torch.float32, progress)
    assert progress.done == progress.announced
    return found


@pytest.fixture
def windows() -> tuple[torch.Tensor, torch.Tensor]:
    chosen_NW, measured_NW = torch.randint(2, 300, (2, 3, 24), generator=torch.Generator().manual_seed(0))
    return chosen_NW, measured_NW


def test_it_is_what_cutting_one_layer_of_a_loaded_model_costs(tmp_path: Path, windows: Any) -> None:
    folder = build_tiny("llama", tmp_path / "dense")
    for layer, losses in enumerate(measured(folder, windows)):
        for fraction, value in losses.items():
            expected = by_hand(folder, windows[0], windows[1], layer, fraction)
            assert value == pytest.approx(expected, rel=2e-3), (layer, fraction)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "opt"])
def test_other_families_lose_more_with_fewer_neurons(family: str, tmp_path: Path, windows: Any) -> None:
    losses = measured(build_tiny(family, tmp_path / "dense"), windows)
    assert [list(points) for points in losses] == [[0.75, 0.5]] * 2
    assert all(points[0.5] > points[0.75] > 0 for points in losses)


def test_windows_that_choose_and_windows_that_measure_are_different_halves_of_the_text() -> None:
    ids_NW = torch.arange(10 * 2 * WINDOW).view(10, 2 * WINDOW)
    chosen_NW, measured_NW = cut_windows(ids_NW, 4 * WINDOW)
    assert chosen_NW.shape == measured_NW.shape == (4, WINDOW)
    assert chosen_NW.max() < ids_NW[5, 0] <= measured_NW.min()
    assert torch.equal(chosen_NW[:, -1] - chosen_NW[:, 0], torch.full((4,), WINDOW - 1))
    assert cut_windows(ids_NW, 10**6)[1].shape == (10, WINDOW)


def test_short_windows_are_taken_whole_and_too_little_text_is_refused() -> None:
    assert cut_windows(torch.zeros(5, 60), 1000)[0].shape == (2, 60)
    assert cut_windows(torch.zeros(1, 2 * WINDOW + 5), 16)[0].shape == (1, WINDOW)
    with pytest.raises(InputError, match="too few to tell layers apart"):
        cut_windows(torch.zeros(1, WINDOW), 1000)

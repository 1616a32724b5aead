"""Training text as windows, in an order that is a pure function of seed and step: a resumed run needs only its step.

Axes: N training windows, H held-out windows, B sequences, W tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.calibration.text import build_windows
from moesaic.errors import InputError
from moesaic.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainData:
    """Token windows for training and, apart, for evaluation.

    Args:
        ids_NW: Training windows, int64.
        held_out_HW: Windows of the same length that training never sees; may have no rows.
        seed: Of the order, which is another permutation in every epoch.
    """

    def __init__(self, ids_NW: Tensor, held_out_HW: Tensor, seed: int = 0) -> None:
        if not len(ids_NW):
            raise InputError("no training text", "keep fewer windows apart, or give more text")
        self.ids_NW = ids_NW
        self.held_out_HW = held_out_HW
        self._seed = seed

    @property
    def window(self) -> int:
        """Tokens of a window, W."""
        return self.ids_NW.shape[1]

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The sequences of a step: ids_BW, and index_B, the number of each among all sequences of the run."""
        index_B = torch.arange(step * size, (step + 1) * size)
        windows = [self._window_of(number) for number in index_B.tolist()]
        return self.ids_NW[windows], index_B

    def fingerprint(self) -> str:
        """sha256 of both sets of windows and the seed."""
        digest = hashlib.sha256(f"{self._seed} {tuple(self.ids_NW.shape)} {tuple(self.held_out_HW.shape)}".encode())
        for ids in (self.ids_NW, self.held_out_HW):
            digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _window_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self.ids_NW))
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch))
        return int(torch.randperm(len(self.ids_NW), generator=generator)[place])


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that is a pure function of ``parts``; neighbouring parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def read_data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> tuple[TrainData, tuple[str, ...]]:
    """The windows that ``config`` asks for, and notes for the user. No window overlaps another.

    Raises InputError as :func:`moesaic.calibration.text.build_windows` does.
    """
    window = min(config.data.window, config.data.tokens, max_positions or config.data.window)
    rows = math.ceil(config.data.tokens / window) + config.held_out
    wanted = config.data.model_copy(update={"tokens": rows * window, "window": window})
    windows = build_windows(wanted, tokenizer, max_positions, vocabulary)
    held_out_HW, ids_NW = windows.ids_NW[: config.held_out], windows.ids_NW[config.held_out :]
    return TrainData(ids_NW, held_out_HW, config.seed), windows.notes

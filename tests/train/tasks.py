"""A small language model to train: everything that the loop promises can be checked on it in milliseconds.

Axes: B sequences, W tokens, V vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.progress import Silent
from moesaic.train.config import TrainConfig
from moesaic.train.data import TrainData
from moesaic.train.launch import leave
from moesaic.train.loop import TrainReport, TrainTask, train
from moesaic.train.losses import next_token_loss

VOCAB, WIDTH, WINDOW = 24, 16, 12


class Kill(Silent):
    """Ends a run like a signal, in the middle of its training, after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, detail: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class TinyTask(TrainTask):
    """A frozen embedding, a trained layer with dropout and a trained head; counts its steps in a buffer."""

    steps_done: Tensor

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, WIDTH).requires_grad_(False)
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB)
            self.idle = nn.Parameter(torch.zeros(3))  # never used, as an expert that no token chooses
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps_done", torch.zeros(()))

    def forward(self, ids_BW: Tensor, index_B: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits_BWV = self.head(torch.tanh(self.layer(self.dropout(self.embedding(ids_BW)))))
        return next_token_loss(logits_BWV, ids_BW), {"first": index_B.float().mean()}

    def held_out(self, ids_BW: Tensor, index_B: Tensor) -> dict[str, Tensor]:
        return {"loss": self(ids_BW, index_B, 0)[0]}

    def blocks(self) -> list[nn.Module]:
        return [self.layer]

    def end_step(self, step: int, mean: Callable[[Tensor], Tensor]) -> None:
        self.steps_done += mean(torch.ones(()))


def text(rows: int = 22, held_out: int = 6, seed: int = 1) -> TrainData:
    """Windows with something to learn: each token is the one before plus one, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    start_N = torch.randint(0, VOCAB, (rows + held_out, 1), generator=generator)
    ids_NW = (start_N + torch.arange(WINDOW)) % VOCAB
    noisy = torch.rand(ids_NW.shape, generator=generator) < 0.1
    ids_NW = torch.where(noisy, torch.randint(0, VOCAB, ids_NW.shape, generator=generator), ids_NW)
    return TrainData(ids_NW[held_out:], ids_NW[:held_out], seed=3)


def config(**values: Any) -> TrainConfig:
    """A run of 12 steps in fp32."""
    given: dict[str, Any] = {"steps": 12, "batch": 4, "learning_rate": 1e-2, "precision": "fp32", "warmup": 2}
    return TrainConfig.model_validate(given | {"eval_every": 4, "save_every": 4} | values)


def run(folder: Path, dropout: float = 0.0, key: int = 0, **values: Any) -> tuple[TinyTask, TrainReport]:
    """Train a fresh task."""
    task = TinyTask(dropout)
    return task, train(task, text(), config(**values), folder, key={"test": key})


def _check_group_has_ended() -> None:
    if torch.distributed.is_initialized():
        sys.stderr.write("the process group was left to the interpreter's end\n")
        leave(3)


def main() -> None:
    """One of several processes: train, interrupted after five steps and taken up again."""
    torch.set_num_threads(1)
    done = []
    atexit.register(lambda: leave(0) if done else None)  # runs last
    atexit.register(_check_group_has_ended)  # runs after what the training registers
    values: dict[str, Any] = {"batch": 8, "accumulate": 2}
    with contextlib.suppress(KeyboardInterrupt):
        train(TinyTask(), text(), config(**values), Path(sys.argv[1]), key={"test": 0}, progress=Kill(5))
    task, _ = run(Path(sys.argv[1]), **values)
    assert hasattr(task.head.weight, "full_tensor") == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
    done.append(task)


if __name__ == "__main__":
    main()

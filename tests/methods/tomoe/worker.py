"""One of several processes that train a tiny ToMoE together."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moesaic.methods.tomoe.task import ToMoETask
from moesaic.train.config import TrainConfig
from moesaic.train.data import TrainData
from moesaic.train.launch import leave
from moesaic.train.loop import TrainReport, train
from tests.methods.tomoe.tiny import tiny_task, tokens


def run(folder: Path, width: str) -> tuple[ToMoETask, TrainReport]:
    """Six steps of four windows, of whichever processes there are."""
    options = {"attention": "both", "budget_control": "penalty", "width": width, "offset": False, "bias": 0.0}
    task = tiny_task("qwen2", **options)
    config = TrainConfig(steps=6, batch=4, learning_rate=1e-2, warmup=0, precision="fp32", eval_every=3, save_every=3)
    ids_NW = tokens(16, 12)
    data = TrainData(ids_NW[4:], ids_NW[:4], seed=0)
    return task, train(task, data, config, folder, key={"test": width})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2])
    leave(0)

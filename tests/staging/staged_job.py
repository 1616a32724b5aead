"""A small conversion with all that a real one writes, for the tests of the staged writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.staging.manifest import check_manifest
from moesaic.staging.writer import StagedOutput

KEY = {"source": "a" * 64, "method": "cmoe", "options": {"layout": "S3A3E8", "markers": 10}}
STEPS = ("layer-00000", "layer-00001", "rest")
SHARDS = {
    step: {f"{step}.weight": torch.full((3, 4), float(i)), f"{step}.bias": torch.arange(3.0) + i}
    for i, step in enumerate(STEPS)
}
PLAN = {"model.layers.0.mlp": LayerPlan(4, torch.tensor([1, 0, 3, 2]))}


def job(out: Path, written: Callable[[str], object] = lambda step: None, key: dict[str, Any] = KEY) -> list[str]:
    """Run it; returns the steps that it had to write."""
    fresh = []
    with StagedOutput.open(out, key) as staged:
        state = staged.read_state()
        first = 0 if state is None else state[0]
        for number, step in enumerate(STEPS):
            if not staged.planned(step):
                assert number >= first, "the state is ahead of the decisions"
                staged.write_plans(step, PLAN)
            if not staged.done(step):
                staged.write_shard(step, SHARDS[step])
                fresh.append(step)
                written(step)
            assert staged.read_plans(step)[0].keys() == PLAN.keys()
            if number >= first:
                staged.write_state(number + 1, {"x": torch.full((5,), float(number))})
        (staged.work / "spill").write_bytes(b"scratch")
        staged.write_text("config.json", '{"model_type": "llama"}\n')
        staged.copy_file(Path(__file__), "extra/code.txt")
        staged.finish(results={"seconds": 1}, verify=check_manifest)
    return fresh


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

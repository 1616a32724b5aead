"""``convert --method tomoe``: a training inside the main job, written, proven, and taken up again after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError
from moesaic.jobs.convert import convert
from moesaic.staging.manifest import UNHASHED
from tests.train.processes import FSDP, two_processes
from tests.train.tasks import Kill

TRAIN = {"steps": 6, "batch": 2, "held_out": 2, "eval_every": 3, "save_every": 2, "precision": "fp32"}
WORKER = "tests.jobs.convert_worker"
CALIBRATION = {"sources": ["tiny"], "tokens": 768, "window": 32}


def settings(**values: Any) -> dict[str, Any]:
    options = {"active": 0.7, "experts": 3, "embedding": 16, "attention": "none", "counted": "ffn", "train": TRAIN}
    return {"method": "tomoe", "options": options | values, "calibration": CALIBRATION}


def files(folder: Path) -> dict[str, bytes]:
    """Everything but what holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in UNHASHED}


def test_experts_become_a_stock_architecture(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    made = convert(tiny("qwen2"), tmp_path / "out", settings=settings(widths="equal"))
    assert made.target == "glm4_moe"
    assert made.results["native_parity"]["max_delta"] < 1e-4
    assert made.results["training"]["active_ffn"] <= 0.7
    assert all(plan.top_k == 1 and len(plan.experts) == 3 for plan in made.blueprint.sites.values())
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_killed_training_goes_on_to_the_same_bytes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = settings(attention="both", counted="model", union=True)
    whole = convert(tiny("llama"), tmp_path / "whole", settings=chosen)
    assert whole.target == "moesaic"
    assert whole.results["parity"]["oracle"] < 1e-5
    with pytest.raises(KeyboardInterrupt):
        convert(tiny("llama"), tmp_path / "killed", settings=chosen, progress=Kill(4))
    assert not (tmp_path / "killed").exists()
    convert(tiny("llama"), tmp_path / "killed", settings=chosen)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert Blueprint.load(tmp_path / "killed").attention.keys() == whole.blueprint.attention.keys() != set()


@pytest.mark.parametrize("environment", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_convert_as_one_does(
    environment: dict[str, str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = settings(start="clusters", union=True)
    one = convert(tiny("llama"), tmp_path / "one", settings=chosen)
    two_processes(WORKER, environment, "convert", tiny("llama"), tmp_path / "two", json.dumps(chosen))
    moesaic.verify(tmp_path / "two")
    losses = [
        [json.loads(line).get("loss", 0) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    there = Blueprint.load(tmp_path / "two").sites
    for path, plan in one.blueprint.sites.items():
        same = [set(a.tolist()) & set(b.tolist()) for a, b in zip(plan.experts, there[path].experts, strict=True)]
        assert min(map(len, same)) >= 0.9 * len(plan.experts[0])


def test_several_processes_are_refused_where_nothing_is_shared(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="nothing that 2 processes could share"):
        convert(tiny("llama"), tmp_path / "out", method="mlpmoe")
    with pytest.raises(InputError, match="batch of 3 cannot be shared by 2"):
        convert(tiny("llama"), tmp_path / "out", settings=settings(train={**TRAIN, "batch": 3}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"router": "oracle"}, "its own linear router"), ({"hierarchical": True}, "starts from a dense model")],
)
def test_what_leaves_it_no_room_is_refused(
    values: dict[str, Any], message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny("llama"), tmp_path / "out", settings=settings() | values)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [("dense", {}, "dense"), ("mixtral", {"experts": 1}, "mixtral")],
)
def test_a_target_that_cannot_hold_the_experts_is_refused_before_the_training(
    target: str, options: dict[str, Any], message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny("llama"), tmp_path / "out", settings=settings(**options) | {"target": target})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("**/train.jsonl"))

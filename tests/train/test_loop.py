"""The loop: resume is exact, parts of a batch are the batch, patience stops, another run's state is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moesaic.errors import CheckpointError, InputError, VerificationError
from moesaic.train import state
from moesaic.train.loop import BEST_NAME, STATE_NAME, read_log, train
from tests.train.tasks import Kill, TinyTask, config, run, text


def timeless(folder: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_log(folder)]


@pytest.mark.parametrize("killed_after", [2, 4, 7, 11])
def test_a_run_that_was_killed_ends_with_the_same_bits(killed_after: int, tmp_path: Path) -> None:
    whole, report = run(tmp_path / "whole", dropout=0.2, accumulate=2)
    with pytest.raises(KeyboardInterrupt):
        train(
            TinyTask(0.2), text(), config(accumulate=2), tmp_path / "cut", key={"test": 0}, progress=Kill(killed_after)
        )
    resumed, again = run(tmp_path / "cut", dropout=0.2, accumulate=2)
    for name, tensor in whole.trained().items():
        assert torch.equal(tensor, resumed.trained()[name]), name
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert (again.steps, again.best_step, again.before, again.after) == (
        report.steps, report.best_step, report.before, report.after
    )  # fmt: skip


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "run")
    before = (tmp_path / "run" / STATE_NAME).read_bytes()
    second, report = run(tmp_path / "run")
    assert (tmp_path / "run" / STATE_NAME).read_bytes() == before
    assert report.steps == 12
    assert all(torch.equal(tensor, second.trained()[name]) for name, tensor in first.trained().items())


def test_training_learns_and_reports_it(tmp_path: Path) -> None:
    task, report = run(tmp_path / "run", steps=40)
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(41))
    assert report.after["loss"] < 0.8 * report.before["loss"]
    assert report.tokens == 40 * 4 * 12
    assert lines[1]["learning_rate"] == pytest.approx(0.005)
    assert lines[40]["learning_rate"] < 1e-4
    assert lines[3]["first"] == pytest.approx(9.5)  # sequences 8..11
    held_out = {line["step"]: line["held_out"]["loss"] for line in lines if "held_out" in line}
    assert report.best_step == min(held_out, key=lambda step: held_out[step])
    assert not task.training


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    parts, _ = run(tmp_path / "parts", accumulate=4)
    for a, b in zip(timeless(tmp_path / "whole"), timeless(tmp_path / "parts"), strict=True):
        assert a["step"] == b["step"]
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
    for name, tensor in whole.trained().items():
        torch.testing.assert_close(tensor, parts.trained()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_patience_ends_a_run_that_gets_worse_and_keeps_the_best(tmp_path: Path) -> None:
    task, report = run(
        tmp_path / "run", steps=400, learning_rate=0.5, schedule="constant", clip=None, patience=2, eval_every=1
    )
    held_out = [line["held_out"]["loss"] for line in read_log(tmp_path / "run")]
    best = held_out.index(min(held_out))
    assert report.stopped_early
    assert report.best_step == best
    assert report.steps == best + 2 < 400
    with torch.no_grad():
        data = text()
        index_H = torch.arange(len(data.held_out_HW))
        assert float(task.held_out(data.held_out_HW, index_H)["loss"]) == pytest.approx(min(held_out), rel=1e-5)


def test_without_held_out_text_the_last_weights_stay(tmp_path: Path) -> None:
    data = text(held_out=0)
    task = TinyTask()
    report = train(task, data, config(held_out=0), tmp_path / "run", key={})
    assert (report.best_step, report.before, report.after) == (12, {}, {})
    assert not (tmp_path / "run" / BEST_NAME).exists()
    assert float(task.steps_done) == 12


def test_a_best_that_no_state_vouches_for_is_not_taken_up(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / STATE_NAME).unlink()
    task = TinyTask()
    train(task, text(held_out=0), config(held_out=0), tmp_path / "run", key={})
    assert not (tmp_path / "run" / BEST_NAME).exists()
    assert float(task.steps_done) == 12


def test_the_optimiser_s_state_lies_where_its_parameter_does() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimiser = torch.optim.AdamW([parameter], fused=False)
    kept = {"w/step": torch.tensor(2.0), "w/exp_avg": torch.ones(3)}
    state.load_optimiser(optimiser, {parameter: "w"}, kept)
    assert {tensor.device.type for tensor in optimiser.state[parameter].values()} == {"meta"}


@pytest.mark.parametrize(("change", "name"), [({"learning_rate": 2e-2}, "learning_rate"), ({"key": 1}, "caller")])
def test_the_state_of_another_run_is_refused(change: dict[str, float], name: str, tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(InputError, match=name):
        run(tmp_path / "run", **change)  # type: ignore[arg-type]


def test_how_often_a_run_is_logged_and_saved_does_not_matter(tmp_path: Path) -> None:
    often, _ = run(tmp_path / "run")
    seldom, _ = run(tmp_path / "run", log_every=5, save_every=12)
    assert all(torch.equal(tensor, seldom.trained()[name]) for name, tensor in often.trained().items())


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / STATE_NAME).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    task = TinyTask()
    with torch.no_grad():
        task.head.bias[0] = math.nan
    with pytest.raises(VerificationError, match="nan"):
        train(task, text(held_out=0), config(held_out=0), tmp_path / "run", key={})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 4, "accumulate": 3}, "cannot be cut"),
        ({"patience": 1, "held_out": 0}, "held-out"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**values)


def test_bf16_learns_nearly_the_same(tmp_path: Path) -> None:
    _, exact = run(tmp_path / "fp32", steps=30)
    task, rounded = run(tmp_path / "bf16", steps=30, precision="bf16")
    assert rounded.after["loss"] == pytest.approx(exact.after["loss"], rel=0.02)
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}

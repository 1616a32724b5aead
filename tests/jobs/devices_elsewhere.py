"""Run by `test_devices.py`: jobs on a second device, where a tensor that was made on the CPU is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError
from moesaic.jobs.convert import convert
from moesaic.jobs.decide import decide
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.job import prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.jobs.tune import tune
from moesaic.jobs.verify import verify_output
from moesaic.options.device import KINDS, find_device
from tests.elsewhere import ELSEWHERE, TwoDevices, on_its_device
from tests.methods.test_contract import ROWS, TEXT, TRAIN, Row

Tiny = Callable[[str], Path]
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv"}
KINDS["elsewhere"] = lambda: 1


class Counting(TwoDevices):
    """Counts products of matrices by the device that computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = on_its_device(func, args, kwargs or {})
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products[made.device.type] += 1
        return made


def gru(x_QND: Tensor, h_2NH: Tensor, weights: Sequence[Tensor], *_options: Any) -> tuple[Tensor, Tensor]:
    """torch's GRU of two directions from its cell's equations: its kernels for other devices are not on the CPU."""
    found = []
    for h_NH, (w_i, w_h, b_i, b_h), backward in zip(h_2NH, (weights[:4], weights[4:]), (False, True), strict=True):
        states = []
        for x_ND in reversed(x_QND.unbind()) if backward else x_QND.unbind():
            (r_i, z_i, n_i), (r_h, z_h, n_h) = (x_ND @ w_i.T + b_i).chunk(3, 1), (h_NH @ w_h.T + b_h).chunk(3, 1)
            new, z = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h), torch.sigmoid(z_i + z_h)
            h_NH = new + z * (h_NH - new)
            states.append(h_NH)
        found.append(torch.stack(states[::-1] if backward else states))
    return torch.cat(found, dim=2), h_2NH


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setattr(torch._VF, "gru", gru)
    with Counting() as counting:
        yield counting


def settings(row: Row, device: str, **more: Any) -> ConvertSettings:
    values = {"method": row.method, "options": row.options, "calibration": TEXT, "device": device}
    return ConvertSettings.model_validate(values | more)


def decided(model: Path, settings: ConvertSettings) -> Blueprint:
    return decide(prepare(check_request(model, settings)))


def test_auto_finds_it_and_others_are_refused() -> None:
    assert find_device("auto") == ELSEWHERE == find_device("elsewhere:0")
    with pytest.raises(InputError, match=r"^device elsewhere:1 is not there "):
        find_device("elsewhere:1")


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_method_decides_there_what_it_decides_here(row: Row, tiny: Tiny, devices: Counting) -> None:
    here = decided(tiny("llama"), settings(row, "cpu"))
    devices.products.clear()
    there = decided(tiny("llama"), settings(row, "elsewhere"))
    assert not devices.products["cpu"]
    assert devices.products["elsewhere"] or not row.config().needs_calibration()
    assert here.sites.keys() == there.sites.keys()
    trains = row.method in ("secret_moe", "token_clusters", "tomoe")  # Adam makes much of small gradients
    for path, plan in here.sites.items():
        assert_same(plan, there.sites[path], 1e-3 if trains else 1e-5)


def assert_same(one: LayerPlan, other: LayerPlan, bound: float) -> None:
    """The same decisions, and numbers that are equal to within the rounding of another order of sums."""
    assert one.spec() == other.spec()
    theirs = other.tensors()
    for name, tensor in one.tensors().items():
        assert tensor.device == theirs[name].device == torch.device("cpu")
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=bound, msg=lambda text, n=name: f"{n}: {text}")


MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "routers": ("llama", "cmoe", {"router": {"mode": "oracle", "steps": 5}}),
    "sensitivity": ("llama", "static", {"allocation": {"mode": "any", "tokens": 64}, "target": "moesaic"}),
    "experts of a MoE": ("mixtral", "cmoe", {"hierarchical": True}),
    "biases": ("phi", "cmoe", {}),
}


@pytest.mark.parametrize("case", MORE)
def test_what_is_adjusted_and_other_families(case: str, tiny: Tiny, devices: Counting) -> None:
    family, method, more = MORE[case]
    row = ROWS[method]
    here = decided(tiny(family), settings(row, "cpu", **more))
    devices.products.clear()
    there = decided(tiny(family), settings(row, "elsewhere", **more))
    assert not devices.products["cpu"]
    for path, plan in here.sites.items():
        assert_same(plan, there.sites[path], 1e-3)


def test_a_conversion_is_verified_measured_and_trained_there(tiny: Tiny, tmp_path: Path, devices: Counting) -> None:
    dense = tiny("llama")
    made = convert(dense, tmp_path / "out", settings=settings(ROWS["cmoe"], "elsewhere", target="moesaic"))
    assert made.results["parity"]["all_on"] < 1e-5
    report = verify_output(made.output, baseline=dense, device="elsewhere")
    assert report.all_on is not None
    assert report.all_on < 1e-5
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog saw it " * 20, encoding="utf-8")
    found = {}
    for device in ("cpu", "elsewhere"):
        devices.products.clear()
        found[device] = evaluate_model(
            made.output,
            baseline=dense,
            text=text,
            window=16,
            limit=2,
            controls=True,
            dtype="fp32",
            device=device,
            save=False,
        )
        assert set(devices.products) == {device}
    assert found["elsewhere"]["device"] == "elsewhere:0"
    for label, row in found["cpu"]["perplexity"].items():
        assert row["value"] == pytest.approx(found["elsewhere"]["perplexity"][label]["value"], rel=2e-3)
    assert found["cpu"]["fidelity"]["summary"] == pytest.approx(found["elsewhere"]["fidelity"]["summary"], rel=1e-2)
    config = {"train": TRAIN | {"data": TEXT}}
    tuned = tune(made.output, tmp_path / "tuned", baseline=dense, config=config, device="elsewhere")
    assert tuned.results["tune_parity"]["relative"] < 1e-5


def test_another_device_does_not_resume(tiny: Tiny, tmp_path: Path) -> None:
    """Sums are rounded otherwise there."""
    here, there = (prepare(check_request(tiny("llama"), settings(ROWS["cmoe"], name))) for name in ("cpu", "auto"))
    assert there.key == here.key | {"device": "elsewhere"}

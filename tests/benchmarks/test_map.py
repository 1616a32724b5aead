"""The map: costs are what a reader can count by hand, references find what is planted, runs go on and pages say it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.map import cost, grids
from benchmarks.map.__main__ import main, records
from benchmarks.map.cost import Shape, Used
from benchmarks.map.measure import Bench
from benchmarks.map.page import markdown, own_grid
from benchmarks.map.points import Point, Setting, beaten, best_within, measured, published
from benchmarks.map.references import (
    Cats,
    LowBit,
    Nested,
    Reference,
    Scored,
    Teal,
    WeightOnly,
    largest,
    quantile,
)
from benchmarks.map.rows import BY_KEY, ROWS
from torch import Tensor

from moesaic.anatomy import read_anatomy
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.samples import sample_text
from moesaic.checkpoint.reader import Checkpoint
from moesaic.nn.ffn import FFNWeights
from tests.tiny_models import build_tiny

D, F = 64, 96
GATED, PLAIN = Shape(D, F), Shape(D, F, gated=False)


def weights(gated: bool = True, seed: int = 0) -> FFNWeights:
    """A random FFN in fp32, biases where there is no gate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 8

    biases = {} if gated else {"up_bias_F": normal(F), "down_bias_D": normal(D)}
    return FFNWeights(normal(F, D), normal(D, F), "silu", normal(F, D) if gated else None, **biases)


@pytest.fixture(name="x_TD")
def inputs() -> Tensor:
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1))


# costs


def test_bytes_are_those_that_can_be_counted() -> None:
    """By hand, in bits per weight of the dense FFN, three matrices of D F weights with 16 bits each."""
    dense = 3 * D * F * 16
    router = 2 * D * F * (4 + 2 * 16 / 64) + 32 * F
    assert cost.low_bit(GATED, Used(neurons=0.5), 4, 64).bytes == pytest.approx(router / dense + 0.5)
    always = 2 * D * F * (4 + 16 / 64) + 32 * F
    chosen = 2 * D * F * 4 + D * F * (8 + 16 / 64)
    assert cost.nested(GATED, Used(neurons=0.25), 64).bytes == pytest.approx((always + chosen / 4) / dense)
    assert cost.weight_only(8, 64, symmetric=True).bytes == pytest.approx((8 + 16 / 64) / 16)
    assert cost.weight_only(4, 32, symmetric=False).bytes == pytest.approx((4 + 32 / 32) / 16)
    teal = cost.teal(GATED, Used(inputs=0.6, neurons=0.3))
    assert teal.bytes == pytest.approx((2 * 0.6 + 0.3) / 3)
    assert cost.cats(GATED, Used(neurons=0.5)).bytes == pytest.approx((1 + 2 * 0.5) / 3)
    assert cost.with_router(Used(neurons=0.5), 0.01).bytes == pytest.approx(0.52)  # fp32 beside bf16


def test_an_ffn_without_a_gate_has_two_matrices() -> None:
    dense = 2 * D * F * 16
    router = D * F * (3 + 2 * 16 / 32) + 32 * F
    assert cost.low_bit(PLAIN, Used(neurons=0.5), 3, 32).bytes == pytest.approx(router / dense + 0.5)
    assert cost.low_bit(PLAIN, Used(neurons=0.5), 3, 32).macs == pytest.approx(0.5 + 0.5)
    assert cost.teal(PLAIN, Used(inputs=0.5, neurons=0.25)).macs == pytest.approx(0.375)


def test_nothing_left_out_costs_what_the_whole_costs() -> None:
    whole = cost.nested(GATED, Used(), 64).bytes - GATED.norm
    assert whole == pytest.approx(cost.weight_only(8, 64, symmetric=True).bytes)
    assert cost.teal(GATED, Used()).bytes == cost.cats(GATED, Used()).bytes == pytest.approx(1)


# grids


@pytest.mark.parametrize("columns", [64, 70])
def test_rounding_to_nearest_errs_by_half_a_step(columns: int) -> None:
    w_RC = torch.randn(9, columns, generator=torch.Generator().manual_seed(2))
    for grid in (grids.symmetric(w_RC, 32), grids.asymmetric(w_RC, 4, 32)):
        step_RC = grid.scale_RG1.expand_as(grid.codes_RGN).flatten(1)[:, :columns]
        error_RC = (grid.decoded() - w_RC).abs()
        assert grid.decoded().shape == w_RC.shape
        assert bool((error_RC <= 0.5 * step_RC + 0.02).all())  # and what bf16 cuts from scale and offset
        assert float(error_RC.mean()) > 0.1 * float(step_RC.mean())


def test_the_high_nibble_leaves_sixteen_codes_open() -> None:
    grid = grids.symmetric(torch.randn(5, 64, generator=torch.Generator().manual_seed(3)), 64)
    apart = (grids.high_nibble(grid) - grid.decoded()) / grid.scale_RG1[:, 0]
    assert float(apart.min()) >= -7.001
    assert float(apart.max()) <= 8.001


@pytest.mark.parametrize("importance", [False, True])
def test_least_squares_err_less_than_the_range(importance: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    w_RC = torch.randn(20, 64, generator=generator)
    importance_C = torch.rand(64, generator=generator) ** 3 if importance else torch.ones(64)

    def error(grid: grids.Grid) -> float:
        return float(((grid.decoded() - w_RC).square() * importance_C).sum())

    fitted = grids.least_squares(w_RC, 2, 32, importance_C if importance else None)
    assert error(fitted) < 0.8 * error(grids.asymmetric(w_RC, 2, 32))
    assert set(fitted.codes_RGN.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_noise_is_one_step_wide() -> None:
    w_RC = torch.linspace(0, 15, 32)[None].repeat(50, 1)  # a 4-bit grid of step 1
    noise_RC = grids.with_noise(w_RC, 32, torch.Generator().manual_seed(5)) - w_RC
    assert float(noise_RC.abs().max()) <= 0.5
    assert float(noise_RC.std()) == pytest.approx(12**-0.5, rel=0.1)


# references


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "reference",
    [
        Reference(),
        Scored(active=1.0),
        LowBit(active=1.0),
        LowBit(active=1.0, choice="threshold", grid="inputs"),
        Teal(active=1.0),
    ],
    ids=str,
)
def test_with_everything_active_it_is_the_dense_ffn(gated: bool, reference: Reference, x_TD: Tensor) -> None:
    dense = weights(gated)
    ffn = reference.fit(dense, x_TD)
    assert torch.equal(ffn(x_TD), dense(x_TD))
    assert ffn.tally.used() == Used()


def test_nested_with_all_neurons_is_int8(x_TD: Tensor) -> None:
    dense = weights()
    whole = Nested(active=1.0).fit(dense, x_TD)(x_TD)
    error = float((whole - dense(x_TD)).norm() / dense(x_TD).norm())
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("reference", [Scored(active=0.25), LowBit(active=0.25), Nested(active=0.25)], ids=str)
def test_the_neurons_that_write_everything_are_found(reference: Scored, x_TD: Tensor) -> None:
    """A quarter of the columns of the down projection is large, the rest next to nothing."""
    planted_F = torch.arange(F) % 4 == 1
    dense = weights()
    dense = replace(dense, down_DF=dense.down_DF * torch.where(planted_F, 1.0, 1e-6))
    ffn = reference.fit(dense, x_TD)
    used_TF = ffn.masked(x_TD) != 0
    assert bool((used_TF == planted_F).all())
    assert ffn.tally.used().neurons == pytest.approx(0.25)


def test_every_token_has_neurons_of_its_own(x_TD: Tensor) -> None:
    """Better than the best fixed set: what a choice by token is for."""
    dense = weights()
    want = dense(x_TD)
    h_TF = dense.hidden(x_TD)
    fixed_F = (h_TF.square().mean(0) * dense.down_DF.square().sum(0)).topk(F // 2).indices
    static = h_TF[:, fixed_F] @ dense.down_DF[:, fixed_F].T
    errors = [float((ref.fit(dense, x_TD)(x_TD) - want).norm()) for ref in (Scored(), LowBit(), LowBit(bits=2))]
    assert errors == sorted(errors)
    assert errors[-1] < float((static - want).norm())


def test_teal_drops_small_inputs_and_small_activations() -> None:
    generator = torch.Generator().manual_seed(6)
    dense = weights()
    x_TD = torch.randn(64, D, generator=generator)
    x_TD[:, ::2] *= 1e-7
    dense = replace(dense, up_FD=dense.up_FD * torch.where(torch.arange(F) < F // 2, 1.0, 1e-7)[:, None])
    ffn = Teal(active=0.5).fit(dense, x_TD)
    torch.testing.assert_close(ffn(x_TD), dense(x_TD), atol=1e-5, rtol=1e-4)
    used = ffn.tally.used()
    assert used.inputs == pytest.approx(0.5)
    assert used.neurons == pytest.approx(0.5, abs=0.01)


def test_cats_keeps_what_the_gate_opens(x_TD: Tensor) -> None:
    dense = weights()
    open_F = torch.arange(F) < F // 4
    gate_bias_F = torch.where(open_F, 3.0, -40.0)  # silu(-40) is nothing
    dense = replace(dense, gate_bias_F=gate_bias_F)
    ffn = Cats(active=0.25).fit(dense, x_TD)
    assert bool(((ffn.masked(x_TD) != 0) == open_F).float().mean() > 0.99)
    torch.testing.assert_close(ffn(x_TD), dense(x_TD), atol=0.02, rtol=0.02)


def test_a_threshold_means_the_share_that_was_asked_for(x_TD: Tensor) -> None:
    ffn = LowBit(active=0.3, choice="threshold").fit(weights(), x_TD)
    per_token_T = (ffn.masked(x_TD) != 0).float().mean(dim=1)
    assert float(per_token_T.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(per_token_T.std()) > 0.01  # hard tokens get more


def test_largest_takes_exactly_so_many_also_of_equal_ones() -> None:
    score_TF = torch.zeros(3, 10)
    score_TF[0, 7] = 1
    for keep in (1, 3, 5, 8, 10):
        mask_TF = largest(score_TF, keep)
        assert mask_TF.sum(dim=1).tolist() == [keep] * 3
        assert bool(mask_TF[0, 7])


def test_quantile_is_the_value_above_which_the_share_is() -> None:
    values = torch.arange(100.0)
    assert quantile(values, 0.25) == 75
    assert quantile(values, 1.0) == -torch.inf
    assert quantile(values, 0.0) == torch.inf


# a model


@pytest.fixture(scope="module", name="dense")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("map") / "tiny")


def bench(folder: Path, **options: Any) -> Bench:
    calibration = {"sources": ["wiki"], "tokens": 512, "window": 128, "compute_dtype": "float32"}
    return Bench(folder, CalibrationConfig.model_validate(calibration), **options)


def test_the_dense_row_is_the_model(dense: Path) -> None:
    from moesaic.checkpoint.loading import load_model

    taken_apart = bench(dense)
    taken_apart.table.update(taken_apart.fitted(Reference()))
    ids_1W = torch.arange(40)[None]
    with torch.inference_mode():
        expected = load_model(dense, torch.float32)(input_ids=ids_1W).logits
        assert torch.equal(taken_apart.model(input_ids=ids_1W).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # transposed weights; an FFN spread over its layer
def test_families_without_a_gate(family: str, tmp_path: Path) -> None:
    from moesaic.checkpoint.loading import load_model

    folder = build_tiny(family, tmp_path / family)
    taken_apart = bench(folder)
    ids_1W = torch.arange(2, 40)[None]
    taken_apart.table.update(taken_apart.fitted(LowBit(active=1.0)))
    with torch.inference_mode():
        expected = load_model(folder, torch.float32)(input_ids=ids_1W).logits
        torch.testing.assert_close(taken_apart.model(input_ids=ids_1W).logits, expected)


def test_one_threshold_for_all_layers(dense: Path) -> None:
    ffns = bench(dense).fitted(LowBit(active=0.5, choice="shared"))
    assert len({ffn.threshold for ffn in ffns.values()}) == 1
    assert len({ffn.threshold for ffn in bench(dense).fitted(LowBit(choice="threshold")).values()}) == len(ffns)


def test_a_refit_makes_up_for_neurons(dense: Path) -> None:
    """On the text that it was made on, in the first layer, whose input no other layer changes."""
    taken_apart = bench(dense)
    path = next(iter(taken_apart.weights))
    plain, refitted = (taken_apart.fitted(LowBit(active=0.25, refit=on))[path] for on in (False, True))
    with torch.no_grad():
        x_TD = taken_apart._dense_inputs()[path]
        want = taken_apart.weights[path](x_TD)
        relative = [float(((ffn(x_TD) - want).norm(dim=1) / want.norm(dim=1)).mean()) for ffn in (plain, refitted)]
    assert relative[1] < 0.95 * relative[0]


def test_noise_is_the_same_for_every_row(dense: Path) -> None:
    one, two = (bench(dense, noise=True).weights for _ in range(2))
    clean = bench(dense).weights
    for path, noised in one.items():
        assert torch.equal(noised.up_FD, two[path].up_FD)
        assert not torch.equal(noised.up_FD, clean[path].up_FD)


def arguments(dense: Path, tmp_path: Path, *more: str) -> list[str]:
    shared = ["--windows", "2", "--window", "64", "--calib", "wiki", "--tokens", "512"]
    return [str(dense), str(tmp_path / "work"), *shared, "--results", str(tmp_path / "results"), *more]


def test_a_run_goes_on_where_it_stopped(dense: Path, tmp_path: Path) -> None:
    asked = arguments(dense, tmp_path, "--texts", "WikiText-2", "--rows", "dense")
    main(asked)
    file = tmp_path / "work" / "rows.jsonl"
    before = file.read_text()
    assert records(file)
    file.write_text(before + before[:50])  # as a crash leaves it
    main([*asked, "low4@50"])
    found = records(file)
    assert [record["row"] for record in found] == ["dense", "low4@50"]
    assert file.read_text().startswith(before)
    main([*asked, "low4@50"])
    assert records(file) == found
    main([*asked, "--noise"])
    assert [record["noise"] for record in records(file)] == [False, False, True]
    with pytest.raises(SystemExit):
        main([*asked, "--tokens", "1024"])  # other thresholds


def test_calibration_on_an_evaluated_text_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine.txt"
    copy.write_text(sample_text("tiny")[:900])
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, "--rows", "dense", "--texts", "stories", "--calib", str(copy)))
    assert "evaluated and calibrated on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, "--page"))


# the page


def line(row: str, nll: tuple[float, ...], text: str = "WikiText-2", **changes: Any) -> dict[str, Any]:
    perplexity = {"name": "p", "value": 1.0, "predicted": 10 * len(nll), "window_nll": list(nll)}
    used = {"inputs": 1.0, "neurons": 0.5 if "@" in row else 1.0}
    shared = {"window": 1024, "windows": len(nll), "noise": False}
    return {"row": row, "text": text, **shared, "perplexity": perplexity, "used": used} | changes


LINES = [
    line("dense", (20.0, 21.0)),
    line("int8", (20.1, 21.1)),
    line("low4@50", (20.4, 21.5)),
    line("nested@50", (20.4, 21.4)),
    line("oracle@50", (20.0, 21.0)),
    line("nested@50", (22.0, 23.0), noise=True),
    line("dense", (21.0, 22.0), noise=True),
    line("low2@50", (24.0, 25.0)),
    line("low2-squares@50", (23.0, 24.0)),
]


def test_a_row_is_compared_with_dense_on_its_own_windows() -> None:
    points = {(point.row, point.setting.noise): point for point in measured(LINES, GATED)}
    assert points["nested@50", False].ratio.ratio == pytest.approx(torch.tensor(0.04).exp().item())
    assert points["nested@50", True].ratio.ratio == pytest.approx(torch.tensor(0.1).exp().item())
    assert points["int8", False].cost.bytes == pytest.approx(8.25 / 16)


def test_what_reads_more_and_is_worse_is_named() -> None:
    points = [point for point in measured(LINES, GATED) if not point.setting.noise]
    lost = {mine.row: other.row for mine, other in beaten(points)}
    assert lost == {"low4@50": "int8", "low2@50": "int8"}
    best = best_within(points, 0.4, "bytes")
    assert best is not None
    assert best.row == "nested@50"
    assert best_within(points, 0.1, "bytes") is None  # the oracle cannot be built


def test_published_rows_are_cut_to_the_same_windows() -> None:
    def row(case: str, nll: list[float], **size: float) -> dict[str, Any]:
        perplexity = {"WikiText-2": {"name": "p", "value": 1.0, "predicted": 10 * len(nll), "window_nll": nll}}
        return {"case": case, "fraction": 0.5, "size": size, "perplexity": perplexity}

    rows = [
        row("dense", [20.0, 21.0, 50.0], parameters=1000, stored_ffn=1.0, active_ffn=1.0),
        row("union-lead", [21.0, 22.0, 90.0], parameters=1010, stored_ffn=1.0, active_ffn=0.5)
        | {"active_on": {"WikiText-2": 0.6}},
        row("static-lead", [22.0, 23.0, 90.0], parameters=600, stored_ffn=0.5, active_ffn=0.5),
        row("cmoe", [1.0, 1.0, 1.0], parameters=1, stored_ffn=1.0, active_ffn=0.5),
    ]
    comparison = {"about": {"window": 1024}, "rows": rows}
    found = published(comparison, {Setting("WikiText-2"): 2, Setting("WikiText-2", 128): 2}, ffn_parameters=800)
    assert [point.row for point in found] == ["union-lead@50", "static-lead@50"]
    assert found[0].ratio.ratio == pytest.approx(torch.tensor(0.1).exp().item())
    assert found[0].cost.bytes == pytest.approx(0.6 + 2 * 10 / 800)
    assert found[1].cost.bytes == pytest.approx(0.5)


def test_the_page_says_all_of_it(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    about = {"model": "tiny", "calibration": {"sources": ["wiki=1"], "tokens": 512, "seed": 0}, "dtype": "float32"}
    (work / "protocol.json").write_text(json.dumps(about))
    (work / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    main(arguments(dense, tmp_path, "--page"))
    results = tmp_path / "results"
    text = (results / "map_tiny.md").read_text()
    assert "| neuron experts nested in int8, 50 % (`nested@50`) | 50.0% |" in text
    assert "weights with noise" in text
    assert "`low2@50` | 0.905" in text  # the variant beside its base
    assert "Where ours loses (WikiText-2)" in text
    assert len(json.loads((results / "map_tiny.json").read_text())["lines"]) == len(LINES)
    assert (results / "map_tiny.png").stat().st_size > 1000


def test_a_model_that_lies_on_a_grid_is_no_comparison_for_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny("llama", tmp_path / "tiny", dtype="float32")
    assert own_grid(Checkpoint(folder), read_anatomy(Checkpoint(folder).config)) == set()
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "mlp" in name:
            tensors[name] = WeightOnly(4, 32)._grid(tensors[name]).decoded().contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    own = own_grid(Checkpoint(folder), read_anatomy(Checkpoint(folder).config))
    assert "q4-g32" in own
    point = replace(measured(LINES, GATED)[0], row="q4-g32", group="grid")
    assert not point.buildable


def test_a_page_without_rows_says_so() -> None:
    about = {"model": "m", "calibration": {"sources": ["wiki"], "tokens": 1}, "dtype": "float32", "machine": "x"}
    assert "## All rows" in markdown(about, list[Point](), [], [])


def test_rows_have_one_name_each_and_their_base() -> None:
    assert len(BY_KEY) == len(ROWS)
    assert {row.base for row in ROWS if row.base} <= BY_KEY.keys()
    for row in ROWS:
        if "@" in row.key and isinstance(row.reference, Scored | Teal):
            assert row.label.endswith(f"{100 * row.reference.active:.0f} %")
        if isinstance(row.reference, WeightOnly):
            assert str(row.reference.bits) in row.label

"""Activations on disk, the Gaussian twin, and the closed-form baselines. Axes: T tokens, D model width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.anatomy import read_anatomy
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.distill.baselines import RIDGES, AffineFits, baselines, top_k_oracle
from moesaic.distill.data import LAWS, SPLITS, Pairs, capture, read_about, read_pairs, write_data
from moesaic.distill.gaussian import Twin, moments
from moesaic.distill.measure import fvu, output_variance
from moesaic.errors import InputError
from moesaic.progress import Silent
from tests.ffns import random_ffn
from tests.tiny_models import VOCAB, build_tiny


def skewed(tokens: int, d: int = 6, seed: int = 0) -> Tensor:
    """Correlated, far from Gaussian, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, d, generator=generator).pow(4) @ torch.randn(d, d, generator=generator) + 2


def test_twin_has_the_moments_and_is_gaussian() -> None:
    of = moments(skewed(5000))
    twin = Twin(of)
    errors = []
    for tokens in (1000, 100_000):
        drawn = moments(twin.draw(tokens, torch.Generator().manual_seed(1)))
        errors.append(
            (float((drawn.mean_D - of.mean_D).norm()), float((drawn.cov_DD - of.cov_DD).norm() / of.cov_DD.norm()))
        )
    assert errors[1][0] < errors[0][0] / 3
    assert errors[1][1] < errors[0][1] / 3
    direction_D = torch.randn(6, generator=torch.Generator().manual_seed(2))
    s_T = twin.draw(100_000, torch.Generator().manual_seed(3)) @ direction_D
    z_T = (s_T - s_T.mean()) / s_T.std()
    assert abs(float(z_T.pow(3).mean())) < 0.05
    assert float(z_T.pow(4).mean()) == pytest.approx(3, abs=0.1)


def test_moments_are_exact_under_a_large_mean() -> None:
    x_TD = skewed(9000) + 1000
    torch.testing.assert_close(moments(x_TD).cov_DD, torch.cov(x_TD.double().T))


def test_captured_inputs_are_those_that_transformers_gives_the_ffn(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_tiny("llama", tmp_path / "model")
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    ids_NW = torch.randint(2, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    site = anatomy.sites_of(1)[0]
    x_TD = capture(LayerStream(checkpoint, anatomy, ids_NW), 1, site.path, Silent())
    seen: list[Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.get_submodule(site.path).register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids_NW)
    torch.testing.assert_close(x_TD, seen[0].flatten(0, 1), rtol=1e-4, atol=1e-5)
    load_ffn(checkpoint, site, anatomy.activation)


def written(folder: Path, x_TD: Tensor, max_norm: float | None = None, batch: int = 1) -> dict[str, object]:
    teacher = random_ffn(d_ff=12, d_model=6, dtype=torch.float32)
    return write_data(folder, x_TD, teacher, window=10, batch=batch, max_norm=max_norm, seed=0, key={"a": 1})


def test_splits_are_whole_windows_with_the_teachers_outputs(tmp_path: Path) -> None:
    x_TD, teacher = skewed(400), random_ffn(d_ff=12, d_model=6, dtype=torch.float32)
    about = written(tmp_path / "data", x_TD)
    assert about["tokens"] == {"train": 320, "validation": 40, "test": 40}
    assert read_about(tmp_path / "data") == ({"a": 1}, about)
    rebuilt = [read_pairs(tmp_path / "data", "real", split).x_TD for split in ("validation", "test", "train")]
    assert torch.equal(torch.cat(rebuilt), x_TD)
    for law in LAWS:
        for split in SPLITS:
            pairs = read_pairs(tmp_path / "data", law, split)
            assert len(pairs.x_TD) == about["tokens"][split]
            torch.testing.assert_close(pairs.y_TD, teacher(pairs.x_TD))
    twin = read_pairs(tmp_path / "data", "gaussian", "train").x_TD
    assert float((twin.mean(0) - rebuilt[2].mean(0)).norm() / rebuilt[2].mean(0).norm()) < 0.05


def test_massive_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    x_TD = skewed(400)
    x_TD[[5, 200]] *= 1000
    about = written(tmp_path / "data", x_TD, max_norm=20.0)
    assert about["left_out"] == 2
    assert about["left_out_energy"] > 0.99
    assert float(read_pairs(tmp_path / "data", "real", "train").x_TD.abs().max()) < 100


def test_too_little_text_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="9 windows of text make no three splits"):
        written(tmp_path / "data", skewed(90))
    assert not (tmp_path / "data").exists()


def test_less_than_a_batch_left_to_train_on_is_refused_and_nothing_written(tmp_path: Path) -> None:
    x_TD = skewed(400)
    assert written(tmp_path / "whole", x_TD, max_norm=20.0, batch=320)["left_out"] == 0
    x_TD[200] *= 1000
    with pytest.raises(InputError, match="a batch of 320 with 319 training tokens left"):
        written(tmp_path / "data", x_TD, max_norm=20.0, batch=320)
    assert not (tmp_path / "data").exists()


def linear_pairs(seed: int, noise: float = 0.1) -> Pairs:
    x_TD = skewed(3000, seed=seed)
    generator = torch.Generator().manual_seed(99)
    y_TD = x_TD @ torch.randn(6, 6, generator=generator) + torch.randn(6, generator=generator)
    return Pairs(x_TD, y_TD + noise * torch.randn(3000, 6, generator=torch.Generator().manual_seed(seed)))


def test_affine_map_is_least_squares_and_reduced_ranks_are_its_best_projections() -> None:
    train = linear_pairs(0)
    fits = AffineFits(train)
    ones_TD = torch.cat([train.x_TD, torch.ones(3000, 1)], dim=1)
    solution = torch.linalg.lstsq(ones_TD.double(), train.y_TD.double()).solution
    affine = fits.ridge(0.0)
    torch.testing.assert_close(affine.weight_OD, solution[:-1].T.float(), rtol=1e-3, atol=1e-3)
    chosen, ridge = fits.best_ridge(linear_pairs(1))
    assert ridge in RIDGES
    errors = [fvu(fits.reduced_rank(affine, rank), train.x_TD, train.y_TD) for rank in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(fvu(affine, train.x_TD, train.y_TD), rel=1e-3)
    assert int(torch.linalg.matrix_rank(fits.reduced_rank(chosen, 2).weight_OD, atol=1e-4)) == 2
    fitted = affine(train.x_TD)
    tail = torch.linalg.eigvalsh(torch.cov(fitted.double().T)).flip(0)[2:].sum() / torch.cov(train.y_TD.T).trace()
    assert errors[1] - errors[-1] == pytest.approx(float(tail), rel=1e-2)


def test_top_k_oracle_keeps_the_neurons_that_write_most() -> None:
    teacher = random_ffn(d_ff=9, d_model=5, biases=True)
    x_TD = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(top_k_oracle(teacher, x_TD, 9), teacher(x_TD))
    h_F = teacher.hidden(x_TD)[2]
    best = int((h_F.abs() * teacher.down_DF.norm(dim=0)).argmax())
    expected = h_F[best] * teacher.down_DF[:, best] + teacher.down_bias_D
    torch.testing.assert_close(top_k_oracle(teacher, x_TD, 1)[2], expected)


def test_baselines_are_reported_at_the_widths_asked_for() -> None:
    teacher = random_ffn(d_ff=12, d_model=6, dtype=torch.float32)
    x = skewed(1000)
    pairs = Pairs(x, teacher(x))
    found = baselines(teacher, pairs, pairs, pairs, (2, 6, 12))
    assert list(found["reduced_rank"]) == ["2", "6"]  # type: ignore[call-overload]
    assert found["top_k_oracle"]["12"] == pytest.approx(0, abs=1e-9)  # type: ignore[index]
    assert found["pca_floor"]["6"] == pytest.approx(0, abs=1e-9)  # type: ignore[index]
    assert found["pca_floor"]["2"] <= found["reduced_rank"]["2"]  # type: ignore[index]


def test_output_variance_survives_a_large_mean() -> None:
    y_TD = skewed(5000) + 1000
    assert output_variance(y_TD) == pytest.approx(float(y_TD.double().var(0, correction=0).mean()), rel=1e-6)

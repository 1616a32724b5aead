"""Training a student: what it must reach, what it cannot, and how it is measured. Axes: T tokens, D model width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.distill.baselines import output_spectrum, pca_floor
from moesaic.distill.data import Pairs
from moesaic.distill.fit import fit, learning_rate
from moesaic.distill.gaussian import Twin, moments
from moesaic.distill.measure import fvu
from moesaic.distill.spec import StudentSpec
from moesaic.distill.student import make_student


def white(tokens: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))


def largest_coordinates(x_TD: Tensor, k: int) -> Tensor:
    index_TK = x_TD.abs().topk(k, dim=1).indices
    return torch.zeros_like(x_TD).scatter(1, index_TK, x_TD.gather(1, index_TK))


@pytest.mark.parametrize(
    ("d", "k", "expected"),
    [(256, 8, 0.802), (256, 32, 0.500), (1024, 16, 0.881), (1024, 64, 0.676), (1024, 128, 0.499)],
)
def test_largest_coordinates_of_white_inputs_leave_what_order_statistics_say(d: int, k: int, expected: float) -> None:
    x_TD = white(2000, d)
    found = fvu(lambda x: largest_coordinates(x, k), x_TD, x_TD)
    assert found == pytest.approx(expected, abs=0.01)


def test_dense_students_stay_above_the_pca_floor_of_their_own_sample() -> None:
    x_TD = white(3000, 24)
    y_TD = torch.nn.functional.gelu(x_TD @ white(64, 24, seed=1).T) @ white(64, 24, seed=2)
    pairs = Pairs(x_TD, y_TD)
    for width in (2, 6):
        found = fit(StudentSpec(shared=width), pairs, pairs, pairs, rate=3e-2, epochs=12, batch=100, seed=0)
        assert found.fvu is not None
        assert pca_floor(output_spectrum(y_TD), width) <= found.fvu < 1


def test_fvu_is_one_for_the_mean_and_zero_for_the_teacher_and_blind_to_scale() -> None:
    x_TD = white(5000, 8)
    y_TD = x_TD.square() + 3
    mean_D = y_TD.mean(0)
    assert fvu(lambda x: mean_D.expand_as(x), x_TD, y_TD) == pytest.approx(1, abs=1e-3)
    assert fvu(lambda x: x.square() + 3, x_TD, y_TD) == 0
    half = fvu(lambda x: x.abs(), x_TD, y_TD)
    assert fvu(lambda x: 7 * x.abs(), x_TD, 7 * y_TD) == pytest.approx(half, rel=1e-5)


@torch.no_grad()
def test_a_dense_student_with_the_teachers_weights_is_the_teacher() -> None:
    teacher, copy = (make_student(StudentSpec(shared=20), 8, seed=seed) for seed in (0, 1))
    x_TD = white(500, 8)
    assert fvu(copy, x_TD, teacher(x_TD)) > 0.1
    copy.load_state_dict(teacher.state_dict())
    assert fvu(copy, x_TD, teacher(x_TD)) == 0


def test_learning_rate_is_a_cosine_to_zero() -> None:
    assert learning_rate(2.0, 0, 10) == 2
    assert learning_rate(2.0, 5, 10) == pytest.approx(1)
    assert learning_rate(2.0, 10, 10) == 0


def test_training_finds_experts_in_dictionary_inputs_and_none_in_their_gaussian_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms_MD = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    on_TM = torch.zeros(9216, 64).scatter(1, torch.rand(9216, 64, generator=generator).topk(2, dim=1).indices, 1.0)
    real_TD = on_TM * (1 + torch.rand(9216, 64, generator=generator)) @ atoms_MD
    twin_TD = Twin(moments(real_TD)).draw(9216, generator)
    ratio = {}
    for law, x_TD in {"real": real_TD, "gaussian": twin_TD}.items():
        train, held = (Pairs(x, x) for x in x_TD.split([8192, 1024]))
        routed = StudentSpec(shared=2, experts=128, top_k=4, rank=32)
        found = [
            fit(spec, train, held, held, rate=1e-2, epochs=12, batch=256, seed=0).fvu
            for spec in (routed, StudentSpec(shared=routed.active))
        ]
        assert found[0] is not None
        assert found[1] is not None
        ratio[law] = found[0] / found[1]
    assert ratio["real"] < 0.75
    assert ratio["gaussian"] > 0.85


def test_incomplete_batches_are_dropped() -> None:
    pairs = Pairs(white(107, 4), white(107, 4))
    found = fit(StudentSpec(shared=2), pairs, pairs, pairs, rate=1e-3, epochs=3, batch=25, seed=0)
    assert found.steps == 3 * (107 // 25)
    assert [row[0] for row in found.curve] == [0, 1, 2, 3]


def test_a_diverging_student_is_reported_and_not_chosen() -> None:
    pairs = Pairs(white(100, 4), white(100, 4))
    found = fit(StudentSpec(shared=2), pairs, pairs, pairs, rate=1e30, epochs=2, batch=25, seed=0)
    assert found.fvu is None

from __future__ import annotations

import math

import pytest
import torch

from moesaic.methods.tomoe.samplers import MEDIAN, gumbel, on_probability, sample_mask, sample_route
from moesaic.train.noise import generator

DRAWS = 40_000


@pytest.mark.parametrize(
    ("logit", "published"), [(-5, 0.1266), (-4, 0.3078), (-3, 0.6321), (-2, 0.9340), (-1, 0.9994), (0, 1 - 2e-9)]
)
def test_masks_are_on_as_often_as_one_gumbel_says(logit: float, published: float) -> None:
    """O1."""
    logits = torch.full((DRAWS,), float(logit))
    hard = sample_mask(logits, gumbel((DRAWS,), generator(0, logit)), 3.0, 0.4)
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    sigma = math.sqrt(published * (1 - published) / DRAWS)
    assert abs(float(hard.mean()) - published) <= 3 * sigma + 1e-4
    assert float(on_probability(torch.tensor(float(logit)), 3.0)) == pytest.approx(published, abs=5e-5)


def test_temperature_scales_the_gradient_of_a_mask_and_leaves_its_value() -> None:
    """O1."""
    noise = gumbel((1000,), generator(1))
    logits = torch.linspace(-6, 0, 1000)
    masks, gradients = [], []
    for temperature in (0.2, 0.4, 1.0):
        leaf = logits.clone().requires_grad_()
        mask = sample_mask(leaf, noise, 3.0, temperature)
        mask.sum().backward()
        y = torch.sigmoid((logits + noise + 3.0) / temperature)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, y * (1 - y) / temperature)
        masks.append(mask.detach())
        gradients.append(leaf.grad)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.allclose(gradients[0], gradients[2])


def test_thresholds_without_noise() -> None:
    """O3: zero is P = 0.632, the median is ln ln 2; and exactly one half is off."""
    assert float(on_probability(torch.tensor(0.0), 0.0)) == pytest.approx(1 - math.exp(-1))
    assert float(on_probability(torch.tensor(MEDIAN), 0.0)) == pytest.approx(0.5)
    assert pytest.approx(-3.36651, abs=1e-5) == MEDIAN - 3
    assert sample_mask(torch.tensor([-3.0, -2.999]), None, 3.0, 0.4).tolist() == [0.0, 1.0]


def test_routes_follow_the_softmax_of_the_logits() -> None:
    """O2: chi-square with 4 degrees of freedom, 99.9 %."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.5])
    noise = gumbel((2, DRAWS // 2, 5), generator(2))
    hard, _ = sample_route(logits.expand(2, DRAWS // 2, 5), noise, 0.4)
    assert torch.equal(hard.sum(-1), torch.ones(2, DRAWS // 2))
    expected = logits.softmax(-1) * DRAWS
    assert float(((hard.sum((0, 1)) - expected).square() / expected).sum()) < 18.47


def test_a_route_has_the_gradient_of_its_relaxation() -> None:
    """O2."""
    logits = torch.randn(3, 7, 5, generator=generator(3)).requires_grad_()
    noise, weight = gumbel((3, 7, 5), generator(4)), torch.randn(3, 7, 5, generator=generator(5))
    hard, soft = sample_route(logits, noise, 0.4)
    found = torch.autograd.grad((hard * weight).sum(), logits)[0]
    again = torch.autograd.grad((((logits + noise) / 0.4).softmax(-1) * weight).sum(), logits)[0]
    torch.testing.assert_close(found, again)
    torch.testing.assert_close(soft, ((logits + noise) / 0.4).softmax(-1))


def test_without_noise_the_largest_logits_are_taken() -> None:
    """O2."""
    logits = torch.randn(4, 6, 5, generator=generator(6))
    assert torch.equal(sample_route(logits, None, 0.4)[0].argmax(-1), logits.argmax(-1))
    two = sample_route(logits, None, 0.4, top_k=2)[0]
    assert torch.equal(two.sum(-1), torch.full((4, 6), 2.0))
    assert bool((two.gather(-1, logits.topk(2, dim=-1).indices) == 1).all())


def test_noise_depends_on_its_tags_alone() -> None:
    first = gumbel((5,), generator(0, 3, 1))
    gumbel((5,), generator(0, 3, 2))
    assert torch.equal(first, gumbel((5,), generator(0, 3, 1)))
    assert not torch.equal(first, gumbel((5,), generator(0, 1, 3)))
    assert not torch.equal(first, gumbel((5,), generator(1, 3, 1)))

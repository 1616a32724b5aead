"""The losses against torch's own, and what distillation asks: zero at equality, blind to ignored positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.train.losses import cross_entropy, kl_divergence, next_token_loss


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient_of(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_kl_and_its_gradient_are_torch_s(chunk: int) -> None:
    student, teacher = logits(0, 2, 5, 11).requires_grad_(), logits(1, 2, 5, 11)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    ours = kl_divergence(student, teacher, mask, chunk)
    log_student, log_teacher = student[mask].log_softmax(-1), teacher[mask].log_softmax(-1)
    theirs = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(2 * ours, student), gradient_of(2 * theirs, student), rtol=1e-4, atol=1e-6)


def test_kl_is_zero_at_equality_and_positive_elsewhere() -> None:
    teacher = logits(1, 7, 11)
    same = teacher.clone().requires_grad_()
    loss = kl_divergence(same, teacher)
    assert abs(float(loss.detach())) < 1e-6
    assert float(gradient_of(loss, same).abs().max()) < 1e-6
    assert float(kl_divergence(teacher + 5.0, teacher)) == pytest.approx(0, abs=1e-5)  # a shift of all logits is none
    assert all(float(kl_divergence(logits(seed, 7, 11), teacher)) > 0 for seed in range(2, 12))


def test_cross_entropy_with_soft_targets_has_the_same_gradient() -> None:
    student, teacher = logits(0, 7, 11).requires_grad_(), logits(1, 7, 11)
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    ours = gradient_of(kl_divergence(student, teacher), student)
    torch.testing.assert_close(ours, gradient_of(soft, student), rtol=1e-4, atol=1e-6)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(soft.detach() - entropy, kl_divergence(student, teacher).detach(), rtol=1e-4, atol=1e-5)


def test_ignored_positions_have_no_influence_whatever_they_hold() -> None:
    student, teacher = logits(0, 6, 11), logits(1, 6, 11)
    mask = torch.tensor([True, False, True, True, False, True])
    broken = student.clone()
    broken[~mask] = torch.nan
    broken.requires_grad_()
    loss = kl_divergence(broken, teacher, mask)
    assert torch.equal(loss.detach(), kl_divergence(student, teacher, mask))
    assert torch.equal(gradient_of(loss, broken)[~mask], torch.zeros(2, 11))


def test_a_batch_of_which_nothing_counts_has_loss_zero() -> None:
    student = logits(0, 4, 11).requires_grad_()
    loss = kl_divergence(student, logits(1, 4, 11), torch.zeros(4, dtype=torch.bool))
    assert float(loss.detach()) == 0
    assert torch.equal(gradient_of(loss, student), torch.zeros(4, 11))


def test_a_token_that_the_teacher_rules_out_adds_nothing() -> None:
    teacher = logits(1, 3, 5)
    teacher[:, 2] = -torch.inf
    student = logits(0, 3, 5).requires_grad_()
    loss = kl_divergence(student, teacher)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_of(loss, student)).all()


def test_next_token_loss_is_torch_s_and_so_is_its_gradient() -> None:
    ids_BW = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    scores = logits(0, 2, 6, 11).requires_grad_()
    theirs = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids_BW[:, 1:].flatten())
    ours = next_token_loss(scores, ids_BW, chunk=4)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores), rtol=1e-4, atol=1e-7)
    mask = torch.arange(12).reshape(2, 6) % 2 == 0
    some = cross_entropy(scores, ids_BW, mask)
    torch.testing.assert_close(some, F.cross_entropy(scores[mask], ids_BW[mask]))


def test_bf16_logits_are_summed_in_fp32() -> None:
    student, teacher = logits(0, 64, 50, dtype=torch.bfloat16), logits(1, 64, 50, dtype=torch.bfloat16)
    ours = kl_divergence(student.requires_grad_(), teacher)
    assert ours.dtype == torch.float32
    exact = kl_divergence(student.detach().float(), teacher.float())
    assert float(ours.detach()) == pytest.approx(float(exact), rel=1e-6)
    assert gradient_of(ours, student).dtype == torch.bfloat16

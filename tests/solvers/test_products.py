"""Products whose operands may be rounded: what is rounded, what is not, and that the setting goes back.

Axes: T tokens, F columns, E rows of the other factor.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from moesaic.solvers.products import BLOCK, block_product, rounded_products


def test_only_operands_are_rounded_and_the_setting_goes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(96, 256, generator=generator), torch.rand(256, 96, generator=generator)
    exact = left.double() @ right.double()
    plain = left @ right
    with rounded_products():
        made = left @ right
    with contextlib.suppress(KeyError), rounded_products():
        raise KeyError
    assert made.dtype == torch.float32
    # A result that was rounded to bfloat16 itself would err by up to 4e-3.
    assert float(((made - exact) / exact).abs().max()) < 1e-3
    assert torch.equal(left @ right, plain)
    with rounded_products(False):
        assert torch.equal(left @ right, plain)


def test_a_gram_matrix_of_rounded_products_has_no_negative_eigenvalue() -> None:
    # Far more columns than tokens, all nearly alike: rounding of the result would make some.
    h_TF = 1 + 0.01 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    with rounded_products():
        gram_FF = (h_TF.T @ h_TF).double()
    assert float(torch.linalg.eigvalsh(gram_FF).min()) > -1e-5 * float(gram_FF.diagonal().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_blocks(dtype: torch.dtype) -> None:
    rows_TF = torch.randn(2 * BLOCK + 3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    own_EF = torch.eye(7)[:3].bool()
    torch.testing.assert_close(block_product(rows_TF, own_EF), rows_TF[:, :3].float())
    assert block_product(rows_TF[:0], own_EF).shape == (0, 3)

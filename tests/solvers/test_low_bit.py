"""Low-bit matrices: how codes are packed, and that they are the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router, single_neurons
from moesaic.blueprint.shape import row_bytes, row_groups
from moesaic.nn.moesaic_low_bit import decode, unpack_codes
from moesaic.nn.reference import decoded
from moesaic.solvers.low_bit import low_bit, pack_codes

over = pytest.mark.parametrize
BITS = over("bits", [2, 3, 4])


def code_of(packed_B: Tensor, bits: int, i: int) -> int:
    """The code of weight i as the format says it."""
    block = [int(byte) for byte in packed_B[i // 64 * 8 * bits :][: 8 * bits]]
    i %= 64
    if bits == 4:
        half, run, j = i // 32, i // 16 % 2, i % 16
        return block[16 * half + j] >> (4 * run) & 15
    low = block[i % 16] >> 2 * (i // 16) & 3
    return low + 4 * (block[16 + i // 8] >> i % 8 & 1) if bits == 3 else low


@BITS
@over("d_model", [16, 64, 69, 200])
def test_codes_lie_where_the_format_says_and_come_back(bits: int, d_model: int) -> None:
    codes_FD = torch.randint(2**bits, (3, d_model), generator=torch.Generator().manual_seed(0))
    packed_FB = pack_codes(codes_FD, bits)
    assert packed_FB.shape == (3, row_bytes(d_model, bits))
    assert [[code_of(row_B, bits, i) for i in range(d_model)] for row_B in packed_FB] == codes_FD.tolist()
    back_FP = unpack_codes(packed_FB, bits)
    assert torch.equal(back_FP[:, :d_model].long(), codes_FD)
    assert not bool(back_FP[:, d_model:].any())


@BITS
@over("group", [32, 64, 128])
@over(("d_model", "dtype"), [(64, torch.float32), (69, torch.bfloat16), (200, torch.float16)])
def test_weights_are_as_near_as_the_grid_allows(bits: int, group: int, d_model: int, dtype: torch.dtype) -> None:
    matrix_FD = torch.randn(5, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes_FB, scale_FG, offset_FG = low_bit(matrix_FD, bits, group)
    assert scale_FG.shape == offset_FG.shape == (5, row_groups(d_model, group))
    made_FD = decode(codes_FB, scale_FG, offset_FG, bits, group, d_model)
    of_group_D = torch.arange(d_model) // group
    step_FD, start_FD = scale_FG.float()[:, of_group_D], offset_FG.float()[:, of_group_D]
    nearest_FD = ((matrix_FD.float() - start_FD) / step_FD).round().clamp(0, 2**bits - 1) * step_FD + start_FD
    torch.testing.assert_close(made_FD, nearest_FD, rtol=1e-5, atol=1e-6)
    tensors = {"up_codes": codes_FB, "up_scale": scale_FG, "up_offset": offset_FG}
    plan = LayerPlan(5, torch.arange(0), single_neurons(5), 2, Router("low_bit", tensors, bits=bits, group=group))
    torch.testing.assert_close(decoded(plan, "up", d_model), made_FD, rtol=1e-6, atol=1e-7)


@BITS
def test_a_matrix_on_its_grid_is_kept_and_more_bits_are_nearer(bits: int) -> None:
    top = 2**bits - 1
    codes_FD = torch.randint(top + 1, (4, 64), generator=torch.Generator().manual_seed(2))
    codes_FD[:, 0], codes_FD[:, 1] = 0, top
    grid_FD = codes_FD * 0.25 - 1
    packed_FB, scale_FG, offset_FG = low_bit(grid_FD, bits, 64)
    assert torch.equal(decode(packed_FB, scale_FG, offset_FG, bits, 64, 64), grid_FD)
    constant = low_bit(torch.full((2, 33), 0.5), bits, 32)
    assert torch.equal(decode(*constant, bits, 32, 33), torch.full((2, 33), 0.5))


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    matrix_FD = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    errors = {
        (bits, group): float((decode(*low_bit(matrix_FD, bits, group), bits, group, 256) - matrix_FD).norm())
        for bits in (2, 3, 4)
        for group in (32, 128)
    }
    assert errors[4, 32] < errors[4, 128] < errors[3, 32] < errors[3, 128] < errors[2, 32] < errors[2, 128]

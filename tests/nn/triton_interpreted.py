"""Run by `test_triton.py` with ``TRITON_INTERPRET=1``: the kernels against the oracle and the sum over neurons.

Axes: T tokens, D model width, P neurons, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moesaic.materialise.apply import build_ffn
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_path_triton import grouped, rows
from moesaic.nn.moesaic_paths import choose
from moesaic.nn.moesaic_side_by_side import lay, lies
from moesaic.nn.moesaic_union import UnionFeedForward
from tests.ffns import random_inputs, relative_error
from tests.nn.folders import convert_by_hand
from tests.nn.test_paths import CASES, expected
from tests.nn.test_rows import by_rule, ffn_of

PATHS = ("triton_rows", "triton_grouped")
KERNELS = {"rows": rows, "grouped": grouped}
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SIXTEEN = (torch.bfloat16, torch.float16)
ROUTED = [name for name in CASES if name not in ("static", "only shared")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ROUTED)
def test_every_form_is_what_the_oracle_says(case: str, path: str) -> None:
    # 16-bit weights take turns; any width and dtype is the next test's.
    for dtype, tokens in ((torch.float32, 1), (SIXTEEN[ROUTED.index(case) % 2], 70)):
        ffn, x_TD = build_ffn(*CASES[case](dtype)), random_inputs(70, dtype=dtype)[:tokens]
        with torch.no_grad(), use_path(ffn, path):
            y_TD = ffn(x_TD)
        assert y_TD.dtype == dtype
        assert relative_error(y_TD.double(), expected(case, dtype, False)[:tokens]) < BOUNDS[dtype]


def weight_of(ffn: MoEFeedForward, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """weight_TP of all neurons; an expert that does not exist has none, one that is named twice counts twice."""
    if isinstance(ffn, UnionFeedForward):
        member_EU = ffn.membership.double()
    else:
        member_EU = torch.eye(6, dtype=torch.float64).repeat_interleave(ffn.width, dim=1)
    real_TK = ((idx_TK >= 0) & (idx_TK < 6)).double()
    weight = real_TK if weight_TK is None else weight_TK.double() * real_TK
    weight_TE = torch.zeros(len(idx_TK), 6, dtype=torch.float64).scatter_add(1, idx_TK.clamp(0, 5), weight)
    return torch.cat([torch.ones(len(idx_TK), ffn.shared, dtype=torch.float64), weight_TE @ member_EU], dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("d_model", "union", "gated", "biases", "activation", "dtype"),
    [
        (1, False, True, False, "silu", torch.float32),
        (31, True, True, True, "gelu", torch.float16),
        (64, False, False, True, "relu", torch.bfloat16),
        (97, True, False, False, "relu2", torch.float32),
        (160, False, True, True, "gelu_new", torch.float16),
        (200, True, True, False, "silu", torch.bfloat16),
    ],
)
def test_any_width_activation_and_layout_in_memory(
    d_model: int, union: bool, gated: bool, biases: bool, activation: str, dtype: torch.dtype, kernel: str
) -> None:
    ffn = ffn_of(d_model, dtype, union=union, gated=gated, biases=biases, activation=activation, unit=1)
    for laid, tokens in ((False, 1), (False, 7), (True, 1), (True, 100)):
        if laid:
            lay(ffn)
        x_TD, idx_TK = torch.randn(tokens, d_model).to(dtype), torch.randint(0, 6, (tokens, 2))
        weight_TK = None if tokens == 7 else torch.rand(tokens, 2)
        with torch.no_grad():
            y_TD = KERNELS[kernel](ffn, x_TD, idx_TK, weight_TK)
            wanted_TD = by_rule(ffn, x_TD, weight_of(ffn, idx_TK, weight_TK))
        assert relative_error(y_TD.double(), wanted_TD) < BOUNDS[dtype], (laid, tokens)


def guarded(tensor: Tensor) -> Tensor:
    """The same values in the middle of memory that spoils a result which reads it."""
    around = torch.full((3 * tensor.numel(),), float("nan") if tensor.is_floating_point() else 1).to(tensor.dtype)
    inside = around[tensor.numel() : 2 * tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("union", [False, True])
def test_experts_that_do_not_exist_add_nothing_and_nothing_outside_is_read(union: bool, kernel: str) -> None:
    ffn = ffn_of(31, torch.float32, union=union, biases=True, unit=1)
    for tensor in [*ffn.parameters(), *ffn.buffers()]:
        tensor.data = guarded(tensor.data)
    idx_TK = guarded(torch.tensor([[0, 5], [-1, 3], [6, 2**40], [-(2**62), 1], [7, -7]]))
    x_TD, weight_TK = guarded(torch.randn(5, 31)), guarded(torch.rand(5, 2))
    with torch.no_grad():
        y_TD = KERNELS[kernel](ffn, x_TD, idx_TK, weight_TK)
    assert relative_error(y_TD.double(), by_rule(ffn, x_TD, weight_of(ffn, idx_TK, weight_TK))) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_that_do_not_fit_are_errors(kernel: str) -> None:
    ffn, x_TD, idx_TK = ffn_of(64, union=True), torch.randn(2, 64).bfloat16(), torch.zeros(2, 1, dtype=torch.long)
    run: Callable[..., Tensor] = KERNELS[kernel]
    with pytest.raises(ValueError, match=r"^inputs of width 32 for matrices of \(660, 64\) and \(64, 660\)$"):
        run(ffn, x_TD[:, :32], idx_TK, None)
    with pytest.raises(ValueError, match=r"^choices for 1 of 2 tokens"):
        run(ffn, x_TD, idx_TK[:1], None)
    ffn.membership = ffn.membership[:, 1:]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^a table of members of the shape \(6, 599\)$"):
        run(ffn, x_TD, idx_TK, None)


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_give_none_and_all_zero_is_zero(path: str) -> None:
    ffn = ffn_of(31, torch.float32, unit=1)
    with torch.no_grad(), use_path(ffn, path):
        assert ffn(torch.empty(0, 31)).shape == (0, 31)
        assert not ffn(torch.zeros(3, 31)).any()


def test_they_run_only_when_asked_for_and_not_where_they_cannot() -> None:
    ffn, x_TD = ffn_of(64), torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        assert choose(x_TD, ffn).name == "rows"
    for path in PATHS:
        with use_path(ffn, path):
            with pytest.raises(ValueError, match=rf"^path {path} cannot compute .* with gradients"):
                ffn(x_TD)
            with torch.no_grad(), torch.autocast("cpu"), pytest.raises(ValueError, match=rf"^path {path} cannot"):
                ffn(x_TD)
    assert not lies(ffn)


def test_a_whole_model_generates_by_them_from_the_files_in_its_folder(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert_by_hand("llama", tiny("llama"), tmp_path / "out")
    CONFIG_MAPPING._extra_content.pop("moesaic", None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with model.use_path("masked"):
        expected = model.generate(ids, **options)
    for path in PATHS:
        with model.use_path(path):
            out = model.generate(ids, **options)
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)

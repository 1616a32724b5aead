"""Run by `test_devices.py`: the runtime on a second device, where a tensor that was made on the CPU is an error.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.blueprint.layer import Router
from moesaic.materialise.apply import build_ffn
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_path_triton import _places, _tiles
from moesaic.nn.moesaic_paths import choose
from moesaic.nn.moesaic_side_by_side import lay, lies
from moesaic.nn.register import register
from tests.elsewhere import ELSEWHERE, Elsewhere, TwoDevices
from tests.ffns import random_inputs, relative_error
from tests.nn.attention import attention_plans
from tests.nn.plans import as_union, plan_of, random_members
from tests.nn.test_paths import BOUNDS, CASES, expected
from tests.targets.helpers import write


@pytest.fixture(autouse=True)
def _two_devices() -> Iterator[None]:
    with TwoDevices(), torch.no_grad():
        yield


def moved(case: str, dtype: torch.dtype) -> MoEFeedForward:
    return build_ffn(*CASES[case](dtype)).to(ELSEWHERE)


def test_a_tensor_on_the_wrong_device_is_an_error() -> None:
    x_TD = torch.randn(3, 4, device=ELSEWHERE)
    assert x_TD.device == ELSEWHERE == (x_TD * 2 + torch.tensor(1.0)).device
    with pytest.raises(RuntimeError, match=r"^aten\.add\.Tensor of tensors on two devices$"):
        x_TD + torch.zeros(3, 4)
    ffn = moved("union", torch.float32)
    ffn.membership = ffn.membership.to("cpu")
    with pytest.raises(RuntimeError, match=r"of tensors on two devices$"):
        ffn(random_inputs(3, dtype=torch.float32).to(ELSEWHERE))


@pytest.mark.parametrize("case", CASES)
def test_every_path_computes_where_the_weights_are(case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ffn = moved(case, dtype)
        for tokens in (0, 1, 70):
            x_TD = random_inputs(70, ffn.up_proj.in_features, dtype=dtype).to(ELSEWHERE)[:tokens]
            able = {
                row.path.name for row in ffn.table if row.path.layout == ffn.layout and row.path.supports(x_TD, ffn)
            }
            routed = {"masked"} if ffn.layout in ("neurons", "nested") else {"masked", "sorted"}
            assert able == (routed if ffn.routed else {"every"})
            assert choose(x_TD, ffn).name in able
            for path in able:
                with use_path(ffn, path):
                    y_TD = ffn(x_TD)
                assert y_TD.device == ELSEWHERE
                if tokens:
                    error = relative_error(y_TD.cpu().double(), expected(case, dtype, False)[:tokens])
                    assert error < BOUNDS[dtype], (path, tokens)


def test_what_decides_moves_along_and_stays_in_fp32() -> None:
    ffn = build_ffn(*CASES["scaled"](torch.float32)).to(ELSEWHERE, torch.bfloat16)
    for name, tensor in ffn.state_dict().items():
        assert tensor.device == ELSEWHERE
        decides = name.startswith("router.") or name in ("selection_bias", "gate_scale")
        assert tensor.dtype == (torch.float32 if decides else torch.bfloat16), name


def test_where_a_unions_experts_are_is_forgotten_when_it_moves() -> None:
    ffn = build_ffn(*CASES["union"](torch.float32))
    ffn.places()
    ffn = ffn.to(ELSEWHERE)
    assert {rows.device for rows in ffn.places()[0]} == {ELSEWHERE}
    places_R, begins, widest = _places(ffn)
    assert places_R.device == begins.device == ELSEWHERE
    assert begins.tolist()[-1] == len(places_R)
    assert widest == max(len(rows) for rows in ffn.places()[0])


def test_tiles_for_gpus_are_made_there() -> None:
    order_N, tiles = _tiles(torch.tensor([2, 0, 2, 7, -1, 2]).to(ELSEWHERE), experts=3, block=2)
    assert {tensor.device for tensor in (order_N, *tiles)} == {ELSEWHERE}
    filled = [(e, first, stop) for e, first, stop in zip(*(t.tolist() for t in tiles), strict=True) if first < stop]
    assert filled == [(0, 1, 2), (2, 2, 5), (2, 4, 5)]
    assert order_N.tolist() == [4, 1, 0, 2, 5, 3]


def test_weights_are_laid_side_by_side_where_they_are() -> None:
    ffn, x_TD = moved("shared", torch.float32), random_inputs(70, dtype=torch.float32).to(ELSEWHERE)
    before = ffn(x_TD)
    lay(ffn)
    assert lies(ffn)
    assert relative_error(ffn(x_TD).cpu(), before.cpu()) < 2e-6


def test_a_whole_model_with_pruned_attention_computes_there(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    register()
    router = Router("linear", {"weight": torch.randn(4, 32)})
    plan = replace(as_union(plan_of(random_members(4, 37, 0.5))), router=router)
    plans = {"model.layers.0.mlp": plan}
    folder = write(tiny("llama"), plans, tmp_path / "out", "moesaic", attention=attention_plans(tiny("llama")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    ids = torch.randint(3, 90, (2, 6))
    logits = model(ids).logits
    model = model.to(ELSEWHERE)
    assert all(isinstance(tensor, Elsewhere) for tensor in [*model.parameters(), *model.buffers()])
    # Without a cache: transformers makes it by torch.tensor, which asks a real backend.
    there = model(ids.to(ELSEWHERE), use_cache=False).logits
    assert there.device == ELSEWHERE
    assert relative_error(there.cpu(), logits) < 1e-5

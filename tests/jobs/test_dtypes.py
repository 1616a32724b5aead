"""Checkpoints in every dtype through every command; and the errors that a 16-bit check must still see."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.native import verify_native
from moesaic.jobs.tune import tune
from moesaic.jobs.verify import verify_output
from tests.dtypes import CALIBRATION, DTYPES, METHODS, MIXED, SIXTEEN, build, equal, rehash, rewrite, tensors_of

STOCK = ("glm4_moe", "granitemoeshared", "qwen2_moe", "mixtral", "ernie4_5_moe")
ROUTED: dict[str, Any] = {"method": "cmoe", "options": {"layout": "S2A3E8"}, "router": "oracle"}
"""K = 3: the targets that store K times a down projection round it in 16 bits."""
TUNE: dict[str, Any] = {"steps": 2, "batch": 2, "held_out": 2, "eval_every": 2, "save_every": 2}
TUNE["data"] = {"sources": ["tiny"], "tokens": 256, "window": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense("bfloat16")``: a tiny checkpoint of that dtype, built once."""
    built: dict[str, Path] = {}

    def folder_of(dtype: str) -> Path:
        if dtype not in built:
            built[dtype] = build(dtype, tmp_path_factory.mktemp(dtype) / "dense", d_ff=40)
        return built[dtype]

    return folder_of


def convert(source: Path, output: Path, **settings: Any) -> Path:
    return moesaic.convert(source, output, calibration=CALIBRATION, **settings).output


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_converts_verifies_and_undoes(dtype: str, name: str, dense: Any, tmp_path: Path) -> None:
    source, (method, options) = dense(dtype), METHODS[name]
    done = moesaic.convert(
        source, tmp_path / "out", method=method, options=options, target="moesaic", calibration=CALIBRATION
    )
    report = verify_output(done.output, baseline=source)
    assert report.oracle is not None
    assert report.oracle <= report.tolerance == 1e-5
    before, after = tensors_of(source), tensors_of(done.output)
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items() if name in before)
    if all(plan.keeps_all for plan in done.blueprint.sites.values()) and not done.blueprint.attention:
        moesaic.undo(done.output, tmp_path / "back")
        assert equal(tensors_of(tmp_path / "back"), before)


@pytest.mark.parametrize(("dtype", "target"), [*(("outer_fp32", name) for name in STOCK), ("float16", "mixtral")])
def test_stock_folders_are_judged_to_the_rounding_of_fp32(dtype: str, target: str, dense: Any, tmp_path: Path) -> None:
    source = dense(dtype)
    out = convert(source, tmp_path / "out", target=target, **ROUTED)
    parity = json.loads((out / "results.json").read_text())["native_parity"]
    scale = parity["max_delta"] / parity["relative"]
    # exact targets: the logits themselves; the others: under the weights that their routers really gave
    assert (parity["median"] if parity["exact"] else parity["forced_delta"] / scale) <= 1e-5
    stored = getattr(torch, Checkpoint(source).info("model.layers.0.mlp.down_proj.weight").dtype)
    assert stored in {tensor.dtype for tensor in tensors_of(out).values()}


@pytest.mark.parametrize("dtype", [*SIXTEEN, *MIXED])
def test_export_tune_and_eval_take_what_convert_made(dtype: str, dense: Any, tmp_path: Path) -> None:
    source = dense(dtype)
    method, options = METHODS["token_clusters-overlapping"]
    out = convert(source, tmp_path / "out", method=method, options=options, target="moesaic")
    assert moesaic.export(out, tmp_path / "stock", target="glm4_moe").results["native_parity"]["median"] <= 1e-5
    tuned = tune(out, tmp_path / "tuned", baseline=source, config={"train": TUNE})
    assert tuned.results["tune_parity"]["relative"] <= 1e-5
    assert {n: t.dtype for n, t in tensors_of(tmp_path / "tuned").items()} == {
        n: t.dtype for n, t in tensors_of(out).items()
    }
    found = evaluate_model(out, baseline=source, window=32, limit=2)["perplexity"]
    assert all(math.isfinite(figures["value"]) for figures in found.values())


def of_the_last_ffn(change: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, tensor: change(name, tensor) if name.startswith("model.layers.1.") else tensor


def swapped_rows(name: str, tensor: Tensor) -> Tensor:
    """Two neurons of one expert change places in the up projection alone."""
    if name.endswith("mlp.up_proj.weight"):  # packed: the first routed expert stands behind 2 of 8 units of 5 neurons
        return tensor[[*range(10), 11, 10, *range(12, len(tensor))]]
    return (
        tensor[[1, 0, *range(2, len(tensor))]]
        if name.endswith(("experts.2.up_proj.weight", "experts.2.w3.weight"))
        else tensor
    )


def lost_scale(name: str, tensor: Tensor) -> Tensor:
    """One expert's down projection is a third of what it should be."""
    if name.endswith("mlp.down_proj.weight"):
        return torch.cat([tensor[:, :10], (tensor[:, 10:15].float() / 3).to(tensor.dtype), tensor[:, 15:]], dim=1)
    return (
        (tensor.float() / 3).to(tensor.dtype)
        if name.endswith(("experts.2.down_proj.weight", "experts.2.w2.weight"))
        else tensor
    )


def another_expert(name: str, tensor: Tensor) -> Tensor:
    """The router's rows of two experts change places."""
    if not name.endswith(("router.weight", "mlp.gate.weight", "router.layer.weight", "block_sparse_moe.gate.weight")):
        return tensor
    return tensor[[2, 3, 0, 1, *range(4, len(tensor))]]


ERRORS = (swapped_rows, lost_scale, another_expert)


@pytest.fixture(scope="module")
def written(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bf16 conversion to a target, built once."""
    built: dict[str, Path] = {}

    def folder_of(target: str) -> Path:
        if target not in built:
            out = tmp_path_factory.mktemp(target) / "out"
            built[target] = convert(dense("bfloat16"), out, target=target, **ROUTED)
        return built[target]

    return folder_of


def with_error(folder: Path, copy: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of an output with a planted error that its manifest does not show."""
    shutil.copytree(folder, copy)
    before = tensors_of(copy)
    rewrite(copy, of_the_last_ffn(change))
    assert not equal(tensors_of(copy), before)
    rehash(copy)
    return copy


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_seen_in_a_16_bit_folder(error: Any, written: Any, dense: Any, tmp_path: Path) -> None:
    broken = with_error(written("moesaic"), tmp_path / "broken", error)
    with pytest.raises(VerificationError, match=r"does not compute what its blueprint says|all experts on"):
        verify_output(broken, baseline=dense("bfloat16"))


@pytest.mark.parametrize(
    ("target", "error"),
    [("glm4_moe", error) for error in ERRORS] + [("mixtral", error) for error in (swapped_rows, lost_scale)],
)
def test_a_planted_error_is_seen_in_a_16_bit_stock_folder(
    target: str, error: Any, written: Any, dense: Any, tmp_path: Path
) -> None:
    broken = with_error(written(target), tmp_path / "broken", error)
    with pytest.raises(VerificationError, match="differs from its blueprint"):
        verify_native(broken, dense("bfloat16"))


def last_router_is_wrong(name: str, tensor: Tensor) -> Tensor:
    """The last layer's router knows one expert less: few tokens change, and no later layer is disturbed."""
    if not name.endswith("mlp.gate.weight"):
        return tensor
    return torch.cat([torch.zeros_like(tensor[:2]), tensor[2:]])


def test_a_wrong_router_in_the_last_layer_is_seen(written: Any, dense: Any, tmp_path: Path) -> None:
    broken = with_error(written("glm4_moe"), tmp_path / "broken", last_router_is_wrong)
    with pytest.raises(VerificationError, match="differs from its blueprint"):
        verify_native(broken, dense("bfloat16"))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_what_is_only_copied_is_compared_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = build("bfloat16", tmp_path / "dense", tie_word_embeddings=False)
    method, options = METHODS["mlpmoe-keep"]
    out = convert(source, tmp_path / "out", method=method, options=options, target="moesaic")
    rewrite(out, lambda other, tensor: tensor.flip(0) if other == name else tensor)
    rehash(out)
    with pytest.raises(VerificationError, match=f"tensor {name} is not that of the dense model"):
        verify_output(out, baseline=source)


def test_weights_beyond_the_range_of_fp16_are_refused_with_a_way_out(tmp_path: Path) -> None:
    source = build("float16", tmp_path / "dense", d_ff=40)
    down = "model.layers.1.mlp.down_proj.weight"
    rewrite(source, lambda name, tensor: torch.full_like(tensor, 4e4) if name == down else tensor)
    with pytest.raises(InputError, match="3 times the down projections, and some are then beyond the range of float16"):
        convert(source, tmp_path / "out", target="mixtral", **ROUTED)


def test_a_narrower_dense_model_is_compared_though_its_config_names_transformers(dense: Any, tmp_path: Path) -> None:
    source = dense("bfloat16")
    method, options = METHODS["static"]
    out = convert(source, tmp_path / "out", method=method, options=options)
    assert "transformers_version" in json.loads((out / "config.json").read_text())
    assert verify_output(out, baseline=source).files > 0
    assert verify_native(out, source).max_delta <= 1e-3

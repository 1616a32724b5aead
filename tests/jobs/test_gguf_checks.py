"""The checks at the end of `export --to gguf`: planted errors are found in every type, and no wrong file stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate import gguf_parity, native_parity
from moesaic.evaluate.llama_cpp import available
from moesaic.evaluate.stock import Stock
from moesaic.gguf import architectures
from moesaic.gguf import file as file_of_gguf
from moesaic.gguf.readback import check_tensors
from moesaic.gguf.tensors import gguf_tensors
from moesaic.jobs.export_gguf import export_gguf
from moesaic.progress import Silent
from moesaic.targets import get_target
from moesaic.targets.base import TargetOptions
from tests.targets.faults import ATTENTION, EXPERTS, Tensors, altered, swap
from tests.targets.helpers import plans_for, split_for, write, write_gguf
from tests.tiny_models import build_tiny

needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _beginning_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens are compared; a tiny tokenizer takes seconds for the whole text."""
    text = evaluation_text()[:2000]
    monkeypatch.setattr(native_parity, "evaluation_text", lambda: text)


NARROW = ("f16", "bf16", "q8_0")


@pytest.fixture(scope="module")
def moe_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 model in glm4_moe."""
    folder = tmp_path_factory.mktemp("bf16")
    dense = build_tiny("llama", folder / "dense", dtype="bfloat16")
    return write(dense, plans_for(dense), folder / "moe", "glm4_moe")


def with_row_swapped(tensors: Tensors, name: str) -> Tensors:
    rows = torch.arange(len(tensors[name]))
    rows[[3, 7]] = rows[[7, 3]]
    return {name: tensors[name][rows]}


NORM = "model.layers.1.input_layernorm.weight"
# What llama.cpp computes from the file is another function: (change of tensors, change of config.json)
FUNCTIONS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "head dropped": (lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}, {}),
    "one expert swapped": (lambda tensors: swap(tensors, f"{EXPERTS}0.", f"{EXPERTS}2."), {}),
    "a row swapped": (lambda tensors: with_row_swapped(tensors, f"{ATTENTION}o_proj.weight"), {}),
    "a lost scale": (lambda tensors: {}, {"routed_scaling_factor": 1.0}),
    "a norm of 1": (lambda tensors: {NORM: torch.ones_like(tensors[NORM])}, {}),
}


@needs_llama_cpp
@pytest.mark.parametrize("dtype", NARROW)
def test_llama_cpp_tells_a_wrong_file_from_rounding_in_every_type(dtype: str, moe_bf16: Path, tmp_path: Path) -> None:
    file = write_gguf(moe_bf16, tmp_path / "right.gguf", dtype).output
    right = gguf_parity.check_gguf(file, moe_bf16, dtype)
    assert right.top1 > 0.9
    assert right.bound is not None
    assert right.median <= right.bound
    for number, (change, config) in enumerate(FUNCTIONS.values()):
        folder = altered(moe_bf16, tmp_path / f"wrong-{number}", change, config)
        file = write_gguf(folder, tmp_path / f"wrong-{number}.gguf", dtype).output
        with pytest.raises(VerificationError, match=f"wrong-{number}.gguf .* differs by more than {dtype} rounds"):
            gguf_parity.check_gguf(file, moe_bf16, dtype)


PAIRS = TargetOptions(exact_weights=True)
# Of a folder without results.json: (target, layout, gate, options, whether its weights only approach 1)
WEIGHTS = {
    "eps": ("granitemoeshared", "S2A2E6", "uniform", TargetOptions(), True),
    "large eps": ("qwen2_moe", "S2A2E6", "uniform", TargetOptions(eps=1e-2), True),
    "sigmoid, eps": ("glm4_moe", "S2A2E6", "uniform", TargetOptions(exact_weights=False), True),
    "twins": ("glm4_moe", "S2A2E6", "uniform", PAIRS, False),
    "one expert": ("mixtral", "S0A1E6", "uniform", TargetOptions(), False),
    "one expert, any scale": ("glm4_moe", "S2A1E6", "uniform", TargetOptions(), False),
    "own weights": ("granitemoeshared", "S2A2E6", "softmax_topk", TargetOptions(), False),
    "all experts": ("granitemoeshared", "S2A4E6", "uniform", TargetOptions(), False),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_whether_weights_approach_1_shows_without_results(case: str, tmp_path: Path) -> None:
    target, layout, gate, options, approach = WEIGHTS[case]
    dense = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    plans = plans_for(dense, layout, gate=gate)
    folder = write(dense, plans, tmp_path / "moe", target, options)
    assert not (folder / "results.json").exists()
    assert get_target(target).exact(split_for(dense, plans), options) != approach
    ids_NW = native_parity.parity_ids(folder, 300, 32)
    assert gguf_parity.approaches_one(folder, Stock(folder), ids_NW) == approach


@pytest.mark.parametrize("target", ["glm4_moe", "granitemoeshared", "qwen2_moe"])
def test_routers_get_no_noise_as_no_file_rounds_them(target: str, tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    stock = Stock(write(dense, plans_for(dense), tmp_path / "moe", target))
    before = {name: tensor.clone() for name, tensor in stock.model.named_parameters()}
    with gguf_parity.noisy(stock.model, "q8_0", 0):
        same = [name for name, tensor in stock.model.named_parameters() if torch.equal(tensor, before[name])]
    matrices = [name for name in same if before[name].dim() > 1]
    assert len([name for name in matrices if "router" in name or name.endswith(".mlp.gate.weight")]) == 2
    assert all("gate" in name or "router" in name for name in matrices)


class Notes(Silent):
    """Keeps what a job remarks."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        self.kept.append(text)


@pytest.mark.parametrize(("dtype", "scale", "told"), [("f16", 1e-7, True), ("f16", 1e-2, False), ("bf16", 1e-7, False)])
def test_matrices_too_small_for_f16_are_named(dtype: str, scale: float, told: bool, tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    folder = altered(dense, tmp_path / "small", lambda tensors: {name: tensors[name] * scale}, {})
    notes = Notes()
    export_gguf(folder, tmp_path / "model.gguf", dtype, progress=notes)
    found = [text for text in notes.kept if "too small for f16" in text]
    assert [("blk.1.ffn_up.weight" in text, "--dtype bf16" in text) for text in found] == [(True, True)] * told


@pytest.mark.parametrize("dtype", NARROW)
def test_the_bound_of_a_type_is_what_it_rounds(dtype: str) -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
    share = (rounded - values).abs() / gguf_parity.half_step(values, dtype)
    assert share.max() <= (1.125 if dtype == "q8_0" else 1)  # the scale of a block is an f16: 254 / 2048 more
    assert share.max() > 0.9  # and no bound is wider than it need be


BYTES: dict[str, Callable[[str, Tensor], Tensor]] = {
    "a row swapped": lambda name, tensor: tensor.roll(1, 0) if name == "blk.1.ffn_up_shexp.weight" else tensor,
    "experts swapped": lambda name, tensor: tensor.flip(0) if name == "blk.0.ffn_down_exps.weight" else tensor,
    "a norm of 1": lambda name, tensor: torch.ones_like(tensor) if name == "output_norm.weight" else tensor,
    "a lost scale": lambda name, tensor: tensor / 2 if name == "blk.1.ffn_gate_inp.weight" else tensor,
    "one value": lambda name, tensor: (
        tensor.index_fill(0, torch.tensor([5]), 1.0) if name == "blk.1.attn_norm.weight" else tensor
    ),
}


@pytest.mark.parametrize("dtype", ["f32", *NARROW])
def test_reading_back_finds_what_the_bytes_have_wrong(
    dtype: str, moe_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = file_of_gguf._encode
    for change in BYTES.values():

        def planted(tensor: Any, stored: Any, pack: Any, change: Any = change) -> Any:
            read = lambda: change(tensor.name, tensor.read())  # noqa: E731
            return encode(replace(tensor, read=read), stored, pack)

        monkeypatch.setattr(file_of_gguf, "_encode", planted)
        with pytest.raises(VerificationError, match=r"differs in .* values from the folder's"):
            export_gguf(moe_bf16, tmp_path / "out" / "model.gguf", dtype)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_tensor_that_is_lost_is_found(moe_bf16: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(moe_bf16)
    architecture = architectures.ARCHITECTURES["glm4_moe"]
    tensors = gguf_tensors(checkpoint, architecture, architectures.read_config(checkpoint.config))
    file = write_gguf(moe_bf16, tmp_path / "model.gguf", "q8_0").output
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    check_tensors(file, tensors, types)
    one_more = [*tensors, replace(tensors[0], name="blk.9.attn_norm.weight")]
    with pytest.raises(VerificationError, match=r"blk\.9\.attn_norm\.weight is missing"):
        check_tensors(file, one_more, types)
    with pytest.raises(VerificationError, match="has no source"):
        check_tensors(file, tensors[:-1], types)


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f32", *NARROW])
def test_a_head_of_its_own_beside_a_config_that_ties_it_is_written(dtype: str, tmp_path: Path) -> None:
    dense = with_other_head(build_tiny("llama", tmp_path / "dense", dtype="bfloat16", tie_word_embeddings=True))
    written = export_gguf(dense, tmp_path / "model.gguf", dtype)
    assert written.parity is not None
    names = {tensor.name for tensor in gguf.GGUFReader(written.output).tensors}
    assert "output.weight" in names


@needs_llama_cpp
def test_a_lost_head_is_refused_in_every_type_and_no_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = with_other_head(build_tiny("llama", tmp_path / "dense", dtype="bfloat16", tie_word_embeddings=True))
    monkeypatch.setattr("moesaic.gguf.tensors.stores_own_head", lambda checkpoint: False)
    for dtype in ("f32", *NARROW):
        with pytest.raises(VerificationError, match=r"model\.gguf in llama\.cpp .* differs"):
            export_gguf(dense, tmp_path / "out" / "model.gguf", dtype)
        assert list((tmp_path / "out").iterdir()) == []


def with_other_head(folder: Path) -> Path:
    """As a merged adapter leaves it: a head of its own, and the flag still on."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    head_VD = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator).bfloat16()
    save_file(tensors | {"lm_head.weight": head_VD}, file, metadata={"format": "pt"})
    return folder


@needs_llama_cpp
def test_an_abort_of_llama_cpp_is_one_line_and_no_file_stays(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = architectures.ARCHITECTURES["glm4_moe"].values

    def all_groups(config: Any) -> Any:
        return values(config) | {"expert_group_count": 4, "expert_group_used_count": 4}

    aborting = replace(architectures.ARCHITECTURES["glm4_moe"], values=all_groups)
    monkeypatch.setitem(architectures.ARCHITECTURES, "glm4_moe", aborting)
    folder = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "moe", "glm4_moe")
    with pytest.raises(VerificationError, match=r"llama\.cpp cannot run model\.gguf: SIGABRT, .*GGML_ASSERT") as found:
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert "\n" not in found.value.message
    assert list((tmp_path / "out").iterdir()) == []


@needs_llama_cpp
def test_an_engine_that_hangs_is_ended(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_ENGINE_TIMEOUT", "0.01")
    with pytest.raises(VerificationError, match=r"gave no answer for model\.gguf within 0\.01 s"):
        export_gguf(tiny("llama"), tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setenv("MOESAIC_ENGINE_TIMEOUT", "soon")
    with pytest.raises(InputError, match="MOESAIC_ENGINE_TIMEOUT is 'soon'"):
        export_gguf(tiny("llama"), tmp_path / "out" / "model.gguf")

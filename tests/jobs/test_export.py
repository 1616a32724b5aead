"""Export of a converted folder: resumable, proven by a fresh process, refused with reasons, never half there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.jobs.export import export
from moesaic.staging.manifest import check_manifest
from moesaic.targets.glm4_moe import Glm4MoE
from tests.targets.helpers import plans_for, write

Tiny = Callable[[str], Path]


@pytest.fixture
def converted(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A folder of the moesaic architecture."""

    def make(family: str = "llama", layout: str = "S2A1E6", **fields: Any) -> Path:
        folder = tmp_path / f"converted-{family}"
        return write(tiny(family), plans_for(tiny(family), layout, **fields), folder, "moesaic")

    return make


def test_an_interrupted_export_resumes_and_equals_a_direct_conversion(
    converted: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = converted(), tmp_path / "out"
    measured = {"evaluation": {"ppl": {}}, "parity": {}, "sample": {}}  # of this folder, by our kernels
    (folder / "results.json").write_text(json.dumps({"conversion": {"method": "test"}} | measured))
    layer_tensors = Glm4MoE.layer_tensors
    layers: list[int] = []

    def interrupted(self: Any, split: Any, layer: int, *rest: Any) -> Any:
        if layer == 1 and not layers.count(1):
            layers.append(1)
            raise KeyboardInterrupt
        layers.append(layer)
        return layer_tensors(self, split, layer, *rest)

    monkeypatch.setattr(Glm4MoE, "layer_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(folder, out)
    assert not out.exists()
    made = export(folder, out)
    assert layers == [0, 1, 1]  # layer 0 was not done again
    assert made.target == "glm4_moe"
    results = json.loads((out / "results.json").read_text())
    assert results["conversion"] == {"method": "test"}
    assert not measured.keys() & results.keys()
    assert results["native_parity"]["exact"] is True
    assert results["native_parity"]["relative"] <= 1e-5
    assert results["native_parity"]["top1"] == 1.0
    assert check_manifest(out) > 0
    direct = write(tiny("llama"), plans_for(tiny("llama"), "S2A1E6"), tmp_path / "direct", "glm4_moe")
    for path in sorted(direct.glob("*.safetensors")):
        assert (out / path.name).read_bytes() == path.read_bytes()
    ours, theirs = Checkpoint(out).config, Checkpoint(direct).config
    assert ours.pop("moesaic")["target"] == "glm4_moe"
    theirs.pop("moesaic")
    assert ours == theirs
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (out / "blueprint.json").read_bytes() == (folder / "blueprint.json").read_bytes()
    assert not (out / "modeling_moesaic.py").exists()


def test_an_output_that_computes_something_else_does_not_appear(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_json = Glm4MoE.config_json
    monkeypatch.setattr(Glm4MoE, "config_json", lambda *args: config_json(*args) | {"routed_scaling_factor": 1.5})
    with pytest.raises(VerificationError, match="differs from its blueprint"):
        export(converted(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "target", "text"),
    [
        ("llama", "moesaic", "already"),
        ("llama", "qwen3_moe", "norm of queries and keys"),
        ("gpt2", "auto", "no stock architecture holds this model"),
        ("llama", "gguf2", "unknown target"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    family: str, target: str, text: str, converted: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=text):
        export(converted(family), tmp_path / "out", target=target)
    assert not list(tmp_path.glob("out*"))


def test_only_folders_of_the_moesaic_architecture_are_exported(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not one of the moesaic architecture"):
        export(tiny("llama"), tmp_path / "out")


def test_unknown_options_are_refused_with_the_known_ones(converted: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="align") as error:
        export(converted(), tmp_path / "out", options={"epsilon": 1})
    assert "eps" in str(error.value)


def test_an_existing_output_is_not_touched(converted: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        export(converted(), tmp_path / "out")

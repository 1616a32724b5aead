"""What stands beside the weights goes along, byte for byte, through every verb; its code is never run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import UNWANTED, WANTED, WANTED_FOLDERS
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import InputError
from moesaic.jobs.convert import convert
from moesaic.jobs.export import export
from moesaic.jobs.undo import undo
from tests.tiny_models import build_tiny, tiny_tokenizer

# As on the hub, beside what build_tiny writes.
SIDE = {
    "additional_chat_templates/rag.jinja": "R",
    "additional_chat_templates/tool_use.jinja": "T",
    "chat_template.jinja": "D",
    "custom_generate/generate.py": "raise SystemExit('run')",
    "preprocessor_config.json": '{"size": 8}',
    "processor_config.json": "{}",
    "special_tokens_map.json": "{}",
    "merges.txt": "a b",
    "vocab.json": "{}",
    "sentencepiece.bpe.model": "m",
    "MODEL_LICENSE.txt": "Licence",
    "USE_POLICY.md": "Policy",
    "tokenization_my.py": "from .helpers import x\nraise SystemExit('run')",
    "helpers.py": "x = 1",
    "modeling_my.py": "raise SystemExit('run')",
}
LEFT = ("run.py", "optimizer.pt", "README.md", ".gitattributes", "checkpoint-5/tokenizer.json", "trainer_state.json")
SPLIT: dict[str, Any] = {"method": "mlpmoe", "options": {"branches": 4}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = build_tiny("llama", tmp_path / "source", dtype="bfloat16", auto_map={"AutoModel": "modeling_my.My"})
    for name, text in {**SIDE, **dict.fromkeys(LEFT, "x")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["tokenization_my.My", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def side(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in checkpoint.side_files()}


def test_all_verbs_copy_the_same_files(source: Path, tmp_path: Path) -> None:
    expected = side(source)
    ours = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert expected.keys() == SIDE.keys() | ours
    convert(source, tmp_path / "moe", target="moesaic", **SPLIT)
    convert(source, tmp_path / "stock", target="dense", **SPLIT)
    export(tmp_path / "moe", tmp_path / "exported", target="dense")
    undo(tmp_path / "moe", tmp_path / "dense")
    for name in ("moe", "stock", "exported", "dense"):
        assert side(tmp_path / name) == expected, name
        template = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=False).chat_template
        assert template == {"default": "D", "rag": "R", "tool_use": "T"}
    assert not any((tmp_path / "moe" / name).exists() for name in LEFT if name != "README.md")


def test_the_hub_fetches_what_is_copied(source: Path) -> None:
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    names += ["consolidated.00.safetensors", "onnx/model.onnx", "pytorch_model.bin", "original/tokenizer.model"]
    fetched = set(filter_repo_objects(names, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    fetched |= set(filter_repo_objects(names, allow_patterns=WANTED_FOLDERS))
    assert fetched >= {*side(source), "config.json", "model.safetensors", "README.md"}
    assert not fetched & {"consolidated.00.safetensors", "onnx/model.onnx", "pytorch_model.bin", "optimizer.pt"}
    assert "checkpoint-5/tokenizer.json" not in fetched


def own_code(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    about = {"tokenizer_class": "My", "auto_map": {"AutoTokenizer": ["tokenization_my.My", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "tokenization_my.py").write_text("raise SystemExit('run')")


def sentencepiece_only(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0f\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 3)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (own_code, r"needs its own code .tokenization_my\.py., which moesaic does not run .*--method mlpmoe"),
        (sentencepiece_only, r"has no tokenizer\.json, and cannot be read without.*add the model's tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    spoil: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = build_tiny("llama", tmp_path / "source", dtype="bfloat16")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out", method="static", calibration={"tokens": 128, "window": 64})
    made = convert(folder, tmp_path / "out", target="moesaic", **SPLIT)  # as the hint says
    assert side(made.output) == side(folder)
    tiny_tokenizer().save_pretrained(folder)  # and so does the other way that it shows
    load_tokenizer(folder)

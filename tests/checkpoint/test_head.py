"""A head of its own beside a config that ties it: every output keeps it and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.checkpoint.head import stores_own_head, with_true_tie
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs import native
from moesaic.jobs.export import export
from moesaic.jobs.undo import undo
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

# family -> names of head and embeddings on disk
NAMES = {
    "llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
}


def tied(folder: Path, family: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Path:
    """A tiny model whose config ties the head; ``change`` makes the stored head of the embeddings."""
    build_tiny(family, folder, dtype="bfloat16", tie_word_embeddings=True)
    head, embeddings = NAMES[family]
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != head}
    if change is not None:
        tensors[head] = change(tensors[embeddings]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def flag(folder: Path) -> list[bool]:
    """What config.json says, and in a folder of the moesaic architecture its inner config."""
    config = json.loads((folder / "config.json").read_text())
    return [part["tie_word_embeddings"] for part in (config, config.get("text_config")) if part]


@pytest.mark.parametrize("family", NAMES)
def test_a_stored_head_counts_where_its_values_differ(family: str, tmp_path: Path) -> None:
    cases: list[tuple[str, Any, bool]] = [
        ("none", None, False),
        ("equal", lambda embeddings_VD: embeddings_VD.clone(), False),
        ("wider", lambda embeddings_VD: embeddings_VD.float(), False),
        ("other", lambda embeddings_VD: embeddings_VD.flip(0), True),
    ]
    for name, change, own in cases:
        checkpoint = Checkpoint(tied(tmp_path / name, family, change))
        assert stores_own_head(checkpoint) is own, name
        assert with_true_tie(checkpoint.config, checkpoint) == checkpoint.config | (
            {"tie_word_embeddings": False} if own else {}
        )


def test_a_flag_that_is_absent_has_the_default_of_the_family(tmp_path: Path) -> None:
    for family, default in (("gpt2", True), ("llama", False)):
        checkpoint = Checkpoint(tied(tmp_path / family, family, lambda embeddings_VD: embeddings_VD.flip(0)))
        config = {key: value for key, value in checkpoint.config.items() if key != "tie_word_embeddings"}
        assert ("tie_word_embeddings" in with_true_tie(config, checkpoint)) is default


def test_every_output_keeps_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "too_large", lambda *_: "no second process: only the files are looked at")
    source = tied(tmp_path / "source", "llama", lambda embeddings_VD: embeddings_VD.flip(0))
    head_VD = Checkpoint(source).tensor("lm_head.weight")
    static = plans_for(source, router="static")
    targets = ("moesaic", "dense", "glm4_moe", "granitemoeshared", "mixtral")
    folders = [write(source, static, tmp_path / target, target) for target in targets]
    folders.append(export(tmp_path / "moesaic", tmp_path / "exported", target="glm4_moe").output)
    folders.append(undo(tmp_path / "moesaic", tmp_path / "undone"))
    for folder in folders:
        assert torch.equal(Checkpoint(folder).tensor("lm_head.weight"), head_VD)
        assert not any(flag(folder)), folder
    undone, dense = Checkpoint(tmp_path / "undone"), Checkpoint(source)
    assert set(undone.names) == set(dense.names)
    assert all(torch.equal(undone.tensor(name), dense.tensor(name)) for name in dense.names)
    assert undone.config == dense.config | {"tie_word_embeddings": False}

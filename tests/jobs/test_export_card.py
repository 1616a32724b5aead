"""An exported folder has a model card of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard

import moesaic


def test_an_exported_folder_says_what_it_is(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    made = moesaic.convert(
        tiny("llama"), tmp_path / "own", method="random", options={"layout": "S2A1E4"}, target="moesaic"
    )
    done = moesaic.export(made.output, tmp_path / "out")
    card = ModelCard.load(done.output / "README.md")
    assert card.data.to_dict()["tags"] == ["moe", "moesaic", "random", "glm4_moe"]
    assert "In stock transformers its logits" in card.text
    assert "trust_remote_code" not in card.text

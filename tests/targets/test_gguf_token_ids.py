"""Token ids of config.json on their way into a GGUF: odd ones are carried, left out, or refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from moesaic.errors import InputError
from moesaic.jobs.export_gguf import export_gguf
from tests.tiny_models import build_tiny


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ({"pad_token_id": -1, "eos_token_id": [5, 6], "bos_token_id": None}, {"eos": 5}),
        ({"pad_token_id": None, "eos_token_id": 300, "bos_token_id": 10**9}, {}),
        ({"eos_token_id": []}, {"bos": 0, "padding": 1}),
    ],
)
def test_odd_token_ids_are_carried_as_far_as_there_are_such_tokens(
    ids: dict[str, Any], found: dict[str, int], tmp_path: Path
) -> None:
    folder = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"pad_token_id": [1], "eos_token_id": [0, 999]}')
    _config(folder, **ids)
    written = export_gguf(folder, tmp_path / "model.gguf")
    metadata = {key: entry.contents() for key, entry in gguf.GGUFReader(written.output).fields.items()}
    names = ("bos", "eos", "unknown", "padding")
    keys = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    assert {name: index for name, index in keys.items() if index is not None} == found


@pytest.mark.parametrize("pad", [300, -301, [1], "one"])
def test_a_padding_token_that_stops_transformers_is_refused_at_once(pad: Any, tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    _config(folder, pad_token_id=pad)
    with pytest.raises(InputError, match="pad_token_id"):
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()

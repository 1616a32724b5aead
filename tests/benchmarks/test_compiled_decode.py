"""`benchmarks/compiled_decode.py`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.compiled_decode import lines, measure
from transformers import AutoModelForCausalLM

from tests.tiny_models import build_tiny


def test_each_model_decodes_as_it_is_and_compiled_and_says_the_same(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path, dtype="float32")).eval()
    found = measure({"dense": model}, "eager", prompt=5, steps=3, rounds=2)
    assert [(name, len(rounds)) for name, rounds in found.items()] == [("dense", 2), ("dense, compiled", 2)]
    head, _, own, compiled = lines(found)
    assert head.count("|") == own.count("|") == compiled.count("|")
    assert "| 1.00 / 1.00 | yes |" in own
    assert compiled.endswith("| yes |")
    found["dense, compiled"][1][1][2] += 1
    assert lines(found)[-1].endswith("| no |")

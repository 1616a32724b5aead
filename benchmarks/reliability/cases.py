"""What is disturbed: one command each of convert, export, tune and eval, on a tiny model in bf16."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_models import build_tiny

from moesaic.staging.manifest import UNHASHED, file_names, hash_file

TEXT = "One expert reads, the others rest; a router in between decides which of them it is. " * 40
VERBS = ("convert", "export", "tune", "eval")
_VARIES = ("seconds", "speed", "peak_memory", "memory")
"""Parts of results.json that differ from run to run."""


@dataclass(frozen=True)
class Inputs:
    """The models that the commands read; a copy may be damaged, these stay.

    Attributes:
        dense: A Llama of three layers in bf16.
        converted: A conversion of it, of the ``moesaic`` architecture.
        text: A text file.
    """

    dense: Path
    converted: Path
    text: Path


def make_inputs(folder: Path) -> Inputs:
    """The inputs, made once."""
    from moesaic.jobs.convert import convert

    inputs = Inputs(folder / "dense", folder / "converted", folder / "text.txt")
    if not inputs.text.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_tiny("llama", inputs.dense, dtype="bfloat16", num_hidden_layers=3)
        convert(inputs.dense, inputs.converted, method="random", options={"layout": "S2A2E7"}, target="moesaic")
        inputs.text.write_text(TEXT)
    return inputs


def command(verb: str, inputs: Inputs, out: Path) -> list[str]:
    """The arguments of ``moesaic`` that write ``out``."""
    dense, converted, text = str(inputs.dense), str(inputs.converted), str(inputs.text)
    layout = ["--layout", "S2A2E7", "--target", "moesaic"]
    calibration = ["--calib", text, "--calib-tokens", "256", "--calib-window", "64"]
    training = ["--steps", "6", "--set", "train.batch=2", "--data", text, "--tokens", "512", "--window", "32"]
    often = ["--set", "train.held_out=2", "--set", "train.save_every=2", "--set", "train.eval_every=3"]
    rest = {
        "convert": [dense, str(out), *layout, *calibration],
        "export": [converted, str(out), "--to", "glm4_moe"],
        "tune": [converted, str(out), "--baseline", dense, *training, *often],
        "eval": [str(out), "--baseline", dense, "--text", text, "--window", "64", "--limit", "4"],
    }
    return [verb, *rest[verb], "--quiet"]


def prepare(verb: str, inputs: Inputs, out: Path) -> None:
    """What must be there before the command runs: eval writes into a conversion."""
    if verb == "eval":
        shutil.copytree(inputs.converted, out)


def partial_of(out: Path) -> Path:
    """Where an unfinished output is kept."""
    return out.with_name(f"{out.name}.partial")


def content(folder: Path) -> dict[str, str]:
    """sha256 of all that must be equal in two outputs: files, and results.json without what varies from run to run.

    The card is made from results.json.
    """
    hashes = {
        name: hash_file(folder / name) for name in file_names(folder) if name == "manifest.json" or name not in UNHASHED
    }
    results = folder / "results.json"
    if results.exists():
        fixed = json.dumps(_fixed(json.loads(results.read_text())), sort_keys=True)
        hashes[results.name] = hashlib.sha256(fixed.encode()).hexdigest()
    return hashes


def _fixed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fixed(part) for key, part in value.items() if not key.startswith(_VARIES)}
    return [_fixed(part) for part in value] if isinstance(value, list) else value


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of files that two outputs do not share."""
    return sorted({name for name, _ in one.items() ^ other.items()})

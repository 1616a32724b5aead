"""Damaged model folders, conversions and GGUF files given to every verb: one plain line, at once, and nothing wrong
written."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.reliability.cases import Inputs, content
from benchmarks.reliability.child import Outcome, Sandbox
from benchmarks.reliability.damage import Damage, copied, damage_bytes, damage_folder
from benchmarks.reliability.kills import last_line
from safetensors import SafetensorError
from safetensors.torch import load_file

from moesaic.staging.manifest import UNHASHED

LIMIT = 1.0
"""CPU seconds that a refusal may take, in a process that has its modules loaded."""
_CODES = (1, 3, 4)


def malformed(number: int, seed: int, inputs: Inputs, box: Sandbox, known: set[str]) -> Iterator[dict[str, Any]]:
    """``number`` damaged inputs, in turn a dense folder in shards, a conversion, and a GGUF file."""
    sources = {"dense": _sharded(inputs, box), "converted": inputs.converted, "gguf": _gguf(inputs, box)}
    for n in range(number):
        key = f"malformed {n}"
        if key in known:
            continue
        what = list(sources)[n % len(sources)]
        dice = random.Random(f"{seed} {key}")
        box.clear()
        victim = copied(sources[what], box.folder / sources[what].name)
        damage = (damage_bytes if what == "gguf" else damage_folder)(victim, dice)
        row = {"key": key, "part": "malformed", "input": what, "kind": damage.kind, "file": damage.file}
        found = _converted(victim, damage, box, inputs) if what == "converted" else _dense(victim, box)
        yield row | {"text": damage.text} | found


def _dense(victim: Path, box: Sandbox) -> dict[str, Any]:
    """``plan`` and ``convert``; what was converted after all must be undone into what the file says."""
    out = box.folder / "out"
    ran = {"plan": box.run(["plan", str(victim), "--layout", "S2A2E7"])}
    ran["convert"] = box.run(["convert", str(victim), str(out), *_RANDOM])
    faults = _judged(ran)
    if ran["convert"].code == 0:
        ran["verify"] = box.run(["verify", str(out)])
        ran["undo"] = box.run(["undo", str(out), str(box.folder / "back")])
        faults += [f"{verb} of the output: {last_line(ran[verb])}" for verb in ("verify", "undo") if ran[verb].code]
        faults += _compared(victim, box.folder / "back") if victim.is_dir() and not faults else []
    elif out.exists():
        faults.append("refused, but the output is there")
    return _row(ran, faults)


_RANDOM = ["--method", "random", "--layout", "S2A2E7", "--target", "moesaic", "--quiet"]


def _converted(victim: Path, damage: Damage, box: Sandbox, inputs: Inputs) -> dict[str, Any]:
    """All verbs that read a conversion. What they accept must be the conversion that was written."""
    out = box.folder / "out"
    ran = {
        "verify": box.run(["verify", str(victim)]),
        "inspect": box.run(["inspect", str(victim)]),
        "undo": box.run(["undo", str(victim), str(box.folder / "back")]),
        "export": box.run(["export", str(victim), str(out), "--quiet"]),
        "eval": box.run(["eval", str(victim), "--text", str(inputs.text), "--window", "64", "--limit", "1", "--quiet"]),
        "convert": box.run(["convert", str(inputs.dense), str(box.folder / "again"), "--blueprint", str(victim)]),
    }
    faults = _judged(ran)
    changed = content(victim) != content(inputs.converted) if victim.is_dir() and _readable(victim) else True
    sees = {"verify", "undo", "export", "eval"} if damage.file not in UNHASHED else set()
    if changed:
        faults += [f"{verb} accepted it" for verb in sorted(sees) if ran[verb].code == 0]
    return _row(ran, faults)


def _readable(folder: Path) -> bool:
    return all(path.is_file() for path in folder.iterdir())


def _judged(ran: dict[str, Outcome]) -> list[str]:
    faults = []
    for verb, outcome in ran.items():
        if outcome.crash:
            faults.append(f"{verb}: {outcome.crash}")
        elif outcome.code not in (0, *_CODES):
            faults.append(f"{verb} ended with {outcome.code}: {last_line(outcome)}")
        elif outcome.code and sum(line.startswith("error: ") for line in outcome.err.splitlines()) != 1:
            faults.append(f"{verb}: no plain error: {last_line(outcome)}")
        elif outcome.code and outcome.seconds > LIMIT:
            faults.append(f"{verb} took {outcome.seconds:.1f} s to refuse: {last_line(outcome)}")
        faults += [f"{verb} left {what}" for what in outcome.left]
    return faults


def _row(ran: dict[str, Outcome], faults: list[str]) -> dict[str, Any]:
    refused = [outcome.seconds for outcome in ran.values() if outcome.code]
    first = next((outcome for outcome in ran.values() if outcome.code), None)
    return {
        "codes": {verb: outcome.code for verb, outcome in ran.items()},
        "seconds": round(max(refused, default=0.0), 2),
        "said": "" if first is None else last_line(first),
        "faults": faults,
    }


def _compared(victim: Path, back: Path) -> list[str]:
    """The undone conversion against the damaged folder, read without moesaic: same tensors, and transformers loads
    both without a tensor too few or too many."""
    from transformers import AutoModelForCausalLM

    try:
        there = {name: t for file in victim.glob("*.safetensors") for name, t in load_file(file).items()}
        loaded: Any = AutoModelForCausalLM.from_pretrained(victim, output_loading_info=True)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        return [f"converted, though it cannot be loaded: {' '.join(str(error).split())[:150]}"]
    faults = [f"converted, though transformers finds {kind}: {min(map(str, n))}" for kind, n in loaded[1].items() if n]
    ours = {name: t for file in back.glob("*.safetensors") for name, t in load_file(file).items()}
    for name in sorted(there.keys() | ours.keys()):
        if name not in there or name not in ours or not torch.equal(there[name], ours[name]):
            faults.append(f"converted to other values of {name}")
            break
    if not all(bool(torch.isfinite(t).all()) for t in ours.values() if t.is_floating_point()):
        faults.append("converted with values that are not finite")
    return faults


def _sharded(inputs: Inputs, box: Sandbox) -> Path:
    """The dense model in several files with an index."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = box.folder.parent / "sharded"
    if not (folder / "tokenizer.json").exists():
        AutoModelForCausalLM.from_pretrained(inputs.dense).save_pretrained(folder, max_shard_size="30KB")
        AutoTokenizer.from_pretrained(inputs.dense).save_pretrained(folder)
    return folder


def _gguf(inputs: Inputs, box: Sandbox) -> Path:
    from tests.checkpoint.test_source import write_gguf
    from tests.tiny_models import build_tiny

    file = box.folder.parent / "tiny.gguf"
    if not file.exists():  # numpy has no bf16
        write_gguf(build_tiny("llama", box.folder.parent / "single", num_hidden_layers=3), file)
    return file

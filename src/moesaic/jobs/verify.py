"""Is an output what was written, and does it compute what it should?

Files first (hashes), then tensors (finite), then config.json against blueprint and tensors, then the loaded model; for
stock architectures, on request, the same model in vLLM.

Axes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import moesaic
from moesaic.anatomy.base import Anatomy, max_positions
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.converted import as_written, check_source, provenance, read_blueprint, read_dense_anatomy
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.loading import load_multimodal, load_whole
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.errors import CheckpointError, InputError, VerificationError
from moesaic.evaluate.engine_parity import WINDOW, EngineParity
from moesaic.evaluate.llama_cpp import stock_logits
from moesaic.evaluate.native_parity import APPROXIMATE_KL, parity_ids
from moesaic.evaluate.parity import (
    TOLERANCE,
    check_copied,
    check_rounding,
    checked_line,
    is_large,
    layers_to_compute,
    oracle_difference,
    relative_difference,
    stream_parity,
)
from moesaic.evaluate.vllm import otherwise_in_vllm, vllm_parity
from moesaic.materialise.pack import pack
from moesaic.options.device import AUTO, device_for, device_of, find_device
from moesaic.staging.manifest import check_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesaic.nn.modeling_moesaic import MoesaicForCausalLM

PROMPT_TOKENS = 32
_SLACK = 1.1
"""Room that a model needs over its weights, for a prompt."""
ORACLE_TOKENS = 64
ENGINE_WINDOW = 256
ENGINE_LOGPROBS = 2**24
"""Log-probabilities of a window that vLLM lists as Python objects: a few GB."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and the figures; every check passed, as a failed one raises.

    Attributes:
        folder: The output.
        files: Files whose sha256 is the manifest's; 0 for a folder that transformers saved after the conversion.
        tensors: Tensors that are finite and of the names and shapes that config.json asks for.
        sites: Converted FFNs; None where transformers saved a folder of a stock architecture, which does not say it.
        partition: Whether every FFN is a partition of the dense one, and the attention is whole.
        checked: What was compared or computed. Outputs of a large model are those of some layers.
        logits: Largest |logit| on the fixed prompt; None for a large model.
        all_on: Largest logit difference from the dense model with all experts on, relative to the largest logit; of a
            large model that of FFN outputs in the layers of ``checked``. None without a baseline, when the conversion
            is no partition, and for stock architectures.
        oracle: Largest relative difference of an FFN's output from that of the dense weights under the blueprint (0 for
            faded FFNs, whose tensors are equal bit for bit); None without a baseline and for stock architectures.
        tolerance: Bound on both differences. All computation is in fp32, whatever the dtype of the weights.
    """

    folder: str
    files: int
    tensors: int
    sites: int | None
    partition: bool
    logits: float | None
    all_on: float | None
    oracle: float | None
    tolerance: float
    checked: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify_output(
    folder: str | Path, *, baseline: str | Path | None = None, full: bool = False, device: str = AUTO
) -> VerifyReport:
    """Check an output of ``moesaic convert``, or what transformers saved of it after a training.

    Of the latter, hashes and blueprint are gone or out of date: names, shapes and values of the tensors are checked
    against config.json, and that the model computes.

    Memory: the model in fp32, once; with ``baseline`` the dense model before it, not beside it. A large model
    (:func:`moesaic.evaluate.parity.is_large`) is not loaded unless ``full``: with ``baseline``, all tensors are
    compared bit for bit, and the FFNs of some layers are computed.

    Args:
        folder: The output.
        baseline: The model that it was made from: folder or .gguf. Adds parity, for the
            moesaic architecture: of copied tensors, bit for bit; of the logits with all experts on for a partition; of
            every FFN with the oracle built from the dense weights and the blueprint. :func:`verify_native` is that of
            stock architectures.
        full: Load and compute all of a large model too.
        device: Where it is computed: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``. ``auto`` takes the CPU
            where the model has no room on the GPU. The oracle is computed on the CPU.

    Raises:
        VerificationError: naming the file, tensor or FFN that is wrong.
        InputError: ``folder`` is no output of moesaic, or ``baseline`` is not the model it was made from.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give the folder of a converted model")
    written = as_written(folder)
    files = check_manifest(folder) if written else 0
    with _as_verification_error():
        output = Checkpoint(folder)
    provenance(output)
    with _as_verification_error():
        blueprint = Blueprint.load(folder) if written else read_blueprint(output)
        for name in output.names:
            output.finite_tensor(name)
    if written and blueprint is not None:
        _check_provenance(output, blueprint)
    if baseline is not None and (reason := tuned(output.config) or ("" if written else "it has no manifest.json")):
        raise InputError(f"{folder} cannot be compared with {baseline}: {reason}", "verify it without --baseline")
    dense = None if baseline is None else _dense_checkpoint(str(baseline), output)
    own = output.config.get("model_type") == "moesaic"
    anatomy = _check_structure(output, blueprint) if own and blueprint is not None else None
    if not full and is_large(output):
        found = _check_sample(output, dense, anatomy, blueprint, find_device(device))
    else:
        size = _SLACK * output.nbytes / getattr(torch, output.dtype).itemsize * torch.float32.itemsize
        found = _check_computed(output, dense, anatomy, blueprint, device_for(device, size, "the model in fp32"))
    return VerifyReport(
        folder=str(folder),
        files=files,
        tensors=len(output.names),
        sites=None if blueprint is None else len(blueprint.sites),
        partition=blueprint is not None and _is_partition(blueprint),
        tolerance=TOLERANCE,
        **found,
    )


def _check_sample(
    output: Checkpoint,
    dense: Checkpoint | None,
    anatomy: Anatomy | None,
    blueprint: Blueprint | None,
    place: torch.device,
) -> dict[str, Any]:
    """Of a large model: all its tensors, and outputs of some layers where there is a dense model beside it."""
    if dense is None or anatomy is None or blueprint is None:
        checked = "hashes, names and values of all tensors, no outputs; --full computes them"
        return {"checked": checked, "logits": None, "all_on": None, "oracle": None}
    layers = layers_to_compute(dense, anatomy, blueprint)
    with _as_verification_error():
        parity = stream_parity(dense, anatomy, output.folder, blueprint, _prompt(output), layers, place)
    checked = checked_line(layers, anatomy.num_layers)
    checked = checked if layers is None else f"{checked}; --full computes all"
    return {"checked": checked, "logits": None, "all_on": parity.all_on, "oracle": parity.oracle}


def _check_computed(
    output: Checkpoint,
    dense: Checkpoint | None,
    anatomy: Anatomy | None,
    blueprint: Blueprint | None,
    place: torch.device,
) -> dict[str, Any]:
    """The loaded model: its logits, and every FFN where there is a dense model beside it."""
    moesaic.register()
    folder, prompt_1T = output.folder, _prompt(output)
    own = output.config.get("model_type") == "moesaic"
    expected_TV = None
    if own and dense is not None and blueprint is not None and _is_partition(blueprint):
        expected_TV = _logits(load_whole(dense.folder).to(place), prompt_1T)
    model = load_whole(folder).to(place)
    logits_TV = _logits(model, prompt_1T)
    if not bool(torch.isfinite(logits_TV).all()):
        raise VerificationError(f"{folder} gives NaN or infinite logits", "report it")
    all_on = oracle = None
    if expected_TV is not None:
        all_on = _all_on_difference(cast("MoesaicForCausalLM", model), prompt_1T, expected_TV, folder)
    if dense is not None and anatomy is not None and blueprint is not None:
        with _as_verification_error():
            check_copied(dense, anatomy, output, blueprint)
        oracle = _oracle_difference(model, dense, anatomy, blueprint)
    if output.whole is not None:
        del model
        _check_whole(folder, prompt_1T, logits_TV, place)
    checked = "logits" if oracle is None else checked_line(None, 0)
    return {"checked": checked, "logits": logits_TV.abs().max().item(), "all_on": all_on, "oracle": oracle}


def verify_in_vllm(folder: str | Path, python: Path, *, exact: bool, windows: int = 1) -> EngineParity:
    """Compare vLLM with transformers on a stock folder, in fp32, on ``windows`` windows of real text.

    Args:
        folder: The stock folder.
        python: The interpreter that has vLLM; see :func:`moesaic.evaluate.vllm.find_python`.
        exact: Whether the target computes weights of 1 exactly. Where it approaches them (``eps``), scores are nearly
            equal and engines may choose other experts, so that only the mean KL divergence is judged.
        windows: For how many windows of 256 tokens. Exact folders are judged over eight times as many of 32; others
            have shorter and more windows where the vocabulary is large.

    Raises:
        InputError: ``python`` has no vLLM.
        VerificationError: vLLM computes something else from this folder, or does not run it.
    """
    folder = Path(folder).expanduser()
    stock = Checkpoint(folder)
    if reason := otherwise_in_vllm(stock):
        raise VerificationError(f"vLLM computes something else from {folder}: {reason}", "see docs/serving.md")
    vocabulary, context = int(stock.config["vocab_size"]), max_positions(stock.config)
    longest = WINDOW if exact else ENGINE_WINDOW
    window = max(2, min(longest, (context or 2 * ENGINE_WINDOW) - 1, ENGINE_LOGPROBS // vocabulary))
    ids_NW = parity_ids(folder, vocabulary, window, -(-windows * ENGINE_WINDOW // window))
    parity = vllm_parity(folder, ids_NW, stock_logits(folder), python=python)
    if exact:
        parity.require_exact(folder.name)
    elif not parity.mean_kl <= APPROXIMATE_KL:
        raise VerificationError(
            f"{folder.name} in {parity.engine} chooses other experts than transformers: mean KL {parity.mean_kl:.1e}",
            "scores scaled by eps are too close: see --set eps",
        )
    return parity


@contextmanager
def _as_verification_error() -> Iterator[None]:
    """A damaged input is a CheckpointError; the same damage in our own output is a failed verification."""
    try:
        yield
    except CheckpointError as error:
        raise VerificationError(error.message, error.hint) from error


def _is_partition(blueprint: Blueprint) -> bool:
    return not blueprint.attention and all(plan.is_partition for plan in blueprint.sites.values())


def _check_provenance(output: Checkpoint, blueprint: Blueprint) -> None:
    if blueprint.digest() != provenance(output)["blueprint"]:
        raise VerificationError(f"{output.folder}: blueprint and config.json belong to different conversions")


def _check_structure(output: Checkpoint, blueprint: Blueprint) -> Anatomy:
    """config.json of the ``moesaic`` architecture against blueprint and tensors; returns the dense model's anatomy."""
    specs = output.config["ffn_sites"]
    if specs.keys() != blueprint.sites.keys():
        odd = min(specs.keys() ^ blueprint.sites.keys())
        raise VerificationError(f"{output.folder}: {odd} is converted in only one of blueprint and config.json")
    anatomy = read_dense_anatomy(output)
    for path, spec in specs.items():
        planned = {key: value for key, value in blueprint.sites[path].spec().items() if key != "down_bias"}
        if wrong := [key for key, value in planned.items() if spec.get(key) != value]:
            raise VerificationError(f"{output.folder}: {path}: config.json and blueprint differ in {wrong[0]}")
    pruned = {path: plan.spec() for path, plan in blueprint.attention.items()}
    if output.config.get("attention_sites", {}) != pruned:
        raise VerificationError(f"{output.folder}: config.json and blueprint differ in the attention")
    check_tensors(output)
    return anatomy


def check_tensors(output: Checkpoint) -> None:
    """Names and shapes of all tensors against the model that config.json describes; reads no weights.

    Left out are experts of blocks that were not converted: transformers merges them into other tensors as it loads.

    Raises VerificationError, naming the tensor that is missing, has no place in the model, or has another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    moesaic.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output.folder, trust_remote_code=False))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys  # written once, under the name of what they are tied to
    converted = {path.partition(".experts.")[0] for path in output.config.get("ffn_sites", ())}
    for name in sorted(wanted.keys() | set(output.names)):
        block, is_expert, _ = name.partition(".experts.")
        if is_expert and block not in converted:
            continue
        if name not in wanted:
            raise VerificationError(f"{output.info(name).file}: tensor {name} has no place in the model")
        if name not in output:
            if name not in tied:
                raise VerificationError(f"{output.folder}: tensor {name} is missing")
        elif wanted[name] != output.info(name).shape:
            shapes = f"{list(output.info(name).shape)}, config.json asks for {list(wanted[name])}"
            raise VerificationError(f"{output.info(name).file}: tensor {name} is {shapes}")


def _dense_checkpoint(baseline: str, output: Checkpoint) -> Checkpoint:
    dense = Checkpoint(resolve_model(baseline))
    check_source(dense, output)
    return dense


def _prompt(output: Checkpoint) -> Tensor:
    """A fixed prompt [1, T] of token ids spread over the vocabulary; needs no tokenizer."""
    vocab_size = int(output.config.get("text_config", output.config)["vocab_size"])
    return (torch.arange(1, PROMPT_TOKENS + 1) * 7919 % vocab_size)[None]


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    return model(input_ids=ids_1T.to(device_of(model)), use_cache=False).logits[0].float().cpu()


def _check_whole(folder: Path, ids_1T: Tensor, expected_TV: Tensor, place: torch.device) -> None:
    """A conversion in place loads as the multimodal model that it is, and computes on text what its text model does."""
    difference = relative_difference(_logits(load_multimodal(folder).to(place), ids_1T), expected_TV)
    if difference > TOLERANCE:
        raise VerificationError(
            f"{folder} differs from the text model in it: relative logit difference {difference:.1e}", "report it"
        )


def _all_on_difference(model: MoesaicForCausalLM, ids_1T: Tensor, expected_TV: Tensor, folder: Path) -> float:
    model.all_experts_on()
    difference = relative_difference(_logits(model, ids_1T), expected_TV)
    model.all_experts_on(False)
    if difference > TOLERANCE:
        raise VerificationError(
            f"{folder} with all experts on differs from the dense model: relative logit difference {difference:.1e}",
            f"at most {TOLERANCE:.0e} is expected; report it",
        )
    return difference


def _check_packed(path: str, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype)):
            raise VerificationError(f"{path}: {name} is not what its blueprint says", "report it")


@torch.inference_mode()
def _oracle_difference(model: PreTrainedModel, dense: Checkpoint, anatomy: Anatomy, blueprint: Blueprint) -> float:
    """Every loaded FFN on random inputs against the oracle; the largest relative difference.

    A faded FFN's tensors are compared with those of its blueprint, bit for bit: the oracle sorts weights one by one,
    which takes minutes for a real model.
    """
    from moesaic.nn.modeling_moesaic import MoEFeedForward

    x_TD = torch.randn(ORACLE_TOKENS, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    modules = {path: module for path, module in model.named_modules() if isinstance(module, MoEFeedForward)}
    largest = 0.0
    for site in anatomy.sites:
        if site.path not in blueprint.sites:
            continue
        if site.path not in modules:
            raise VerificationError(f"{site.path} is not a MoE FFN in the loaded model")
        weights, plan = load_ffn(dense, site, anatomy.activation), blueprint.sites[site.path]
        if plan.fade is not None:
            _check_packed(site.path, modules[site.path].state_dict(), pack(weights, plan))
            continue
        check_rounding(modules[site.path], weights, plan, site.path)
        difference = oracle_difference(modules[site.path], weights, plan, x_TD)
        if difference > TOLERANCE:
            raise VerificationError(
                f"{site.path} does not compute what its blueprint says: relative difference {difference:.1e}",
                "report it",
            )
        largest = max(largest, difference)
    return largest

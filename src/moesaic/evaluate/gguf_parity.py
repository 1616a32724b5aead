"""Is a GGUF right? llama.cpp on the file against transformers on the stock folder it was written from.

An f32 file must compute the same function (:meth:`EngineParity.require_exact`). A narrower type rounds, so its bound is
measured on the model itself [OURS]: transformers runs the folder again with noise on every matrix that the file rounds.
The noise is uniform in the rounding interval of the type, so it moves the logits as far as rounding the weights does.
llama.cpp also rounds the inputs of each product to the same type, which is as much again, and independent. Variances
add: a right file differs by sqrt(2) times the noise, or by less where the folder's weights fit the type already.
Measured on right files: 0.5 to 1.6 times. ``NOISE_FACTOR`` times the noise is allowed. Routers that choose other
experts because of rounding do so in both, so the bound grows with them. What hides below the noise, such as two rows of
one matrix in the wrong order, is found by :mod:`moesaic.gguf.readback`, which needs no engine.

Axes: N windows, W tokens per window, V vocabulary, C candidates, B blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import VerificationError
from moesaic.evaluate.engine_parity import EXACT_MEDIAN, WINDOW, WINDOWS, EngineParity
from moesaic.evaluate.llama_cpp import llama_cpp_parity
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.stock import Stock
from moesaic.staging.results import read_results

APPROXIMATE_KL = 1e-2
"""Largest mean KL divergence, in nats, of an f32 file from a folder that only approaches weights of 1."""
NOISE_FACTOR = 2.5
"""A narrower file may differ by this many times the noise: sqrt(2) is expected, the rest is for chance."""
_DRAWS = 3
_LONG_WINDOW = 256
_CANDIDATES = 64
_RELATIVE = {"f16": 2.0**-11, "bf16": 2.0**-8}
"""Half the distance of neighbouring numbers, over the number: 11 and 8 significant bits."""
_BLOCK, _STEPS = 32, 254
"""q8_0: values of a block share one scale, its largest / 127; half a step is the largest / 254."""
_SHARES = {"q6_k": 0.020, "q5_k_m": 0.040, "q4_k_m": 0.077, "q4_0": 0.097, "q3_k_m": 0.166, "q2_k": 0.328}
"""Error of a block over its norm, in the type of most tensors, of normal numbers [OURS: measured]."""
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight")
_PRECISE = (*_ROUTERS, "shared_expert_gate.weight")
"""Matrices that are f32 in every file: the routers, and the gate of a shared expert."""
_COARSE = 0.02
"""Scores of a smaller deviation are there to give weights of 1: ``eps``. Others have 0.03 and more."""


def check_gguf(gguf: Path, folder: Path, dtype: str) -> EngineParity:
    """Compare llama.cpp on ``gguf`` with transformers on ``folder``, on 256 tokens of text, and judge the file.

    Equality is judged over short windows (see :mod:`engine_parity`). A folder that approaches weights of 1 by scores of
    size eps is another matter: fp32 cannot tell all neighbouring scores apart, so engines choose other experts for some
    tokens. How often, and what becomes of the text after them, is then the question: such a file is judged on one long
    window.

    Args:
        gguf: The file.
        folder: The stock folder.
        dtype: Storage type of its matrices.

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: the file computes something else, or llama.cpp cannot run it.
    """
    stock = Stock(folder)
    vocabulary = int(Checkpoint(folder).config["vocab_size"])
    approximate = approaches_one(folder, stock, parity_ids(folder, vocabulary, WINDOW))
    window, windows = (_LONG_WINDOW, 1) if approximate else (WINDOW, WINDOWS)
    ids_NW = parity_ids(folder, vocabulary, window, windows)
    parity = llama_cpp_parity(gguf, ids_NW, stock.logits, candidates=_CANDIDATES)
    if dtype == "f32" and not approximate:
        parity.require_exact(gguf.name)
    elif dtype == "f32":
        if not parity.mean_kl <= APPROXIMATE_KL:
            raise VerificationError(
                f"{gguf.name} in llama.cpp chooses other experts than transformers: mean KL {parity.mean_kl:.1e}",
                "its scores are too close to each other: export the folder with a larger eps, or to glm4_moe",
            )
    else:
        bound = max(EXACT_MEDIAN, NOISE_FACTOR * rounding_noise(stock, ids_NW, dtype))
        if not (parity.median <= bound and math.isfinite(parity.window_median)):
            raise VerificationError(
                f"{gguf.name} in {parity.engine} differs by more than {dtype} rounds: log-probabilities by "
                f"{parity.median:.1e} (median), rounding explains {bound:.1e}",
                "report it",
            )
        parity = replace(parity, bound=bound)
    return parity


def approaches_one(folder: Path, stock: Stock, ids_NW: Tensor) -> bool:
    """Whether routers give weights of 1 by scores of size eps: as the export found, or else as its scores look.

    A folder that transformers or somebody else saved has no results.json.
    """
    known = read_results(folder).get("native_parity", {}).get("exact")
    if known is not None:
        return not known
    config = stock.model.config
    one = config.to_dict().get("num_experts_per_tok") == 1 and getattr(config, "norm_topk_prob", True)
    if one or getattr(config, "n_group", 1) > 1:  # weights are divided by their sum, or an expert has a twin
        return False
    return any(0 < deviation < _COARSE for deviation in _deviations(stock, ids_NW))


def _deviations(stock: Stock, ids_NW: Tensor) -> list[float]:
    """Standard deviation of each router's scores over experts and tokens."""
    found: list[float] = []

    def look(router: Any, inputs: tuple[Tensor, ...]) -> None:
        z_TE = inputs[0].flatten(0, -2).float() @ router.weight.float().T
        found.append((z_TE - z_TE.mean(-1, keepdim=True)).square().mean().sqrt().item())

    names = tuple(name.removesuffix(".weight") for name in _ROUTERS)
    modules = stock.model.named_modules()
    routers = [module for name, module in modules if name.endswith(names) and hasattr(module, "weight")]
    handles = [router.register_forward_pre_hook(look) for router in routers]
    try:
        for ids_W in ids_NW:
            stock.logits(ids_W)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def noisy(model: Any, dtype: str, seed: int) -> Iterator[None]:
    """A model with rounding noise of a type on its matrices, for the length of a block."""
    _add_noise(model, dtype, seed, 1)
    try:
        yield
    finally:
        _add_noise(model, dtype, seed, -1)


@torch.inference_mode()
def _add_noise(model: Any, dtype: str, seed: int, sign: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(_PRECISE):
            uniform = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
            parameter.add_(uniform.mul_(half_step(parameter, dtype)), alpha=sign)


def half_step(weight: Tensor, dtype: str) -> Tensor:
    """The largest rounding error of each value in a narrow type. Rows that do not fill blocks of 32 are f16.

    Narrower types than q8_0: half the width of uniform noise that is as large as their errors.
    """
    if dtype in _SHARES and weight.shape[-1] % _BLOCK == 0:
        blocks = weight.unflatten(-1, (-1, _BLOCK))
        error = blocks.square().mean(-1, keepdim=True).sqrt() * _SHARES[dtype]
        return (3**0.5 * error).expand(blocks.shape).flatten(-2)
    if dtype != "q8_0" or weight.shape[-1] % _BLOCK:
        return weight.abs() * _RELATIVE.get(dtype, _RELATIVE["f16"])
    blocks = weight.unflatten(-1, (-1, _BLOCK))
    return (blocks.abs().amax(-1, keepdim=True) / _STEPS).expand(blocks.shape).flatten(-2)


def rounding_noise(stock: Stock, ids_NW: Tensor, dtype: str) -> float:
    """How far rounding noise moves log-probabilities: the median over positions, the largest of a few draws."""
    expected = [stock.logits(ids_W) for ids_W in ids_NW]
    found = []
    for seed in range(_DRAWS):
        with noisy(stock.model, dtype, seed):
            moved = [_moved(logits_WV, stock.logits(ids_W)) for logits_WV, ids_W in zip(expected, ids_NW, strict=True)]
        found.append(torch.cat(moved).median().item())
    return max(found)


def _moved(expected_WV: Tensor, actual_WV: Tensor) -> Tensor:
    """Per position the largest |log-probability difference| over the likeliest candidates, as engines are compared."""
    ids_WC = expected_WV.topk(min(_CANDIDATES, expected_WV.shape[-1]), dim=-1).indices
    expected_WC, actual_WC = (part.double().gather(-1, ids_WC).log_softmax(-1) for part in (expected_WV, actual_WV))
    return (expected_WC - actual_WC).abs().amax(-1)

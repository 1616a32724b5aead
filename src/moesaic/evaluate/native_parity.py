"""Does a folder compute in stock transformers what its blueprint says? Logits from a fresh process in which moesaic is
not imported.

The fresh process loads the folder in fp32, refuses missing and unexpected tensors, and hands over the logits of one
window at a time.

Axes: N windows, W tokens per window, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.perplexity import token_windows

EXACT_TOLERANCE = 1e-4
"""Median |logit difference| over the largest |logit| of a target that computes the same function: fp32 rounding."""
APPROXIMATE_KL = 1e-3
"""Largest mean KL divergence, in nats, of a target that reaches weights of 1 only in the limit."""

_SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, work = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
)
assert "moesaic" not in sys.modules
wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
if wrong:
    sys.exit("tensors do not fit the architecture: " + json.dumps(wrong)[:600])
for ids in load_file(work + "/ids.safetensors")["ids"]:
    with torch.inference_mode():
        logits = model.eval()(ids[None], use_cache=False).logits[0].float()
    save_file({"logits": logits.contiguous()}, work + "/logits.safetensors")
    print("@ready", flush=True)
    sys.stdin.readline()
"""


@dataclass(frozen=True)
class NativeParity:
    """Stock transformers against the reference on the same tokens, fp32.

    Attributes:
        tokens: Tokens compared.
        exact: Whether the target computes the same function, or only approaches weights of 1.
        max_delta: Largest |logit difference|. Where two experts are nearly equal, rounding decides, and a token that
            takes the other one differs visibly: a few of them are in every long comparison.
        relative: That over the largest |logit| of the reference.
        median: The same of the token in the middle, when tokens are ordered by their largest |logit difference|.
        top1: Share of tokens whose likeliest next token is the same.
        mean_kl: Mean KL divergence of the folder's distribution from the reference's, nats.
    """

    tokens: int
    exact: bool
    max_delta: float
    relative: float
    median: float
    top1: float
    mean_kl: float

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)

    def require(self, name: str) -> None:
        """Raise VerificationError when the folder is not what it should be."""
        wrong = not self.median <= EXACT_TOLERANCE if self.exact else not self.mean_kl <= APPROXIMATE_KL
        if wrong:
            raise VerificationError(
                f"{name} in stock transformers differs from its blueprint: logits by {self.median:.1e} (median, "
                f"relative), mean KL {self.mean_kl:.1e}",
                "report it" if self.exact else "weights of 1 are too coarse here: use glm4_moe with exact_weights",
            )


def native_parity(folder: Path, ids_NW: Tensor, reference: Callable[[Tensor], Tensor], *, exact: bool) -> NativeParity:
    """Compare a folder in stock transformers with ``reference``, which maps ids_W to logits_WV.

    Raises VerificationError when stock transformers cannot load the folder, or misses or does not know a tensor of it.
    """
    deltas: list[Tensor] = []
    scale = agreed = divergence = 0.0
    for ids_W, actual_WV in zip(ids_NW, _stock_logits(folder, ids_NW), strict=True):
        expected_WV = reference(ids_W).float()
        deltas.append((actual_WV - expected_WV).abs().amax(-1).nan_to_num(nan=float("inf")))
        scale = max(scale, expected_WV.abs().max().item())
        agreed += (actual_WV.argmax(-1) == expected_WV.argmax(-1)).sum().item()
        divergence += _divergence(expected_WV, actual_WV)
    tokens, scale = ids_NW.numel(), max(scale, 1e-30)
    delta_T = torch.cat(deltas)
    largest, median = delta_T.max().item(), delta_T.median().item()
    mean_kl = _finite(divergence / tokens)
    return NativeParity(tokens, exact, largest, largest / scale, median / scale, agreed / tokens, mean_kl)


def parity_ids(folder: Path, vocabulary: int, window: int, count: int = 1) -> Tensor:
    """ids_NW to compare on: the evaluation text by the folder's tokenizer, pseudo-random ids where it has none."""
    from transformers import AutoTokenizer

    try:
        ids_NW = token_windows(AutoTokenizer.from_pretrained(folder), evaluation_text(), window, count)
    except (OSError, ValueError, KeyError, InputError):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (count, window), generator=generator)
    return ids_NW.clamp(max=vocabulary - 1)


def _stock_logits(folder: Path, ids_NW: Tensor) -> Iterator[Tensor]:
    """logits_WV of each window, from a fresh isolated process; at most one window lies on disk at a time."""
    with tempfile.TemporaryDirectory() as work, (Path(work) / "errors").open("w+") as errors:
        save_file({"ids": ids_NW.contiguous()}, Path(work) / "ids.safetensors")
        command = [sys.executable, "-I", "-c", _SCRIPT, str(folder), work]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for _ in ids_NW:
                    if not any(line.startswith("@ready") for line in process.stdout):
                        process.wait()
                        raise VerificationError(
                            f"stock transformers cannot run {folder}: {_last_line(errors)}", "report it"
                        )
                    yield load_file(Path(work) / "logits.safetensors")["logits"]
                    process.stdin.write("\n")
                    process.stdin.flush()
            finally:
                process.kill()


def _last_line(errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:700] if lines else "it stopped without a message"


def _divergence(expected_WV: Tensor, actual_WV: Tensor) -> float:
    """Summed KL(expected || actual) in nats, a few tokens at a time."""
    total = 0.0
    for expected, actual in zip(expected_WV.split(256), actual_WV.split(256), strict=True):
        log_p, log_q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return total


def _finite(value: float) -> float:
    """NaN, of a broken model, as infinity: it must fail every bound."""
    return value if value == value else float("inf")

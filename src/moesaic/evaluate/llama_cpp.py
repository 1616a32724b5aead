"""Does a GGUF compute in llama.cpp what the folder it was written from computes in transformers?

llama.cpp comes as the wheel ``xllamacpp``: its server inside this process, of which we ask the log-probabilities of the
likeliest next tokens at every position. Attention caches are f32 and the text is fed as token ids. Distributions are
compared over these candidates alone, both normalised anew: llama.cpp sums its normaliser in fp32, which shifts all
log-probabilities of a position by 1e-4 at 50 000 tokens.

Axes: N windows, W tokens per window, V vocabulary, C candidates that llama.cpp names.
"""

from __future__ import annotations

import importlib
import json
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import InputError, VerificationError

EXACT_MEDIAN, EXACT_KL = 1e-3, 1e-4
"""For an f32 file: bounds of the median |log-probability difference| and of the mean KL divergence, in nats."""


def available() -> bool:
    """Whether llama.cpp can be run here."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


class LlamaCpp:
    """A GGUF in llama.cpp on the CPU; a context manager.

    Args:
        gguf: The file.
        context: Tokens of context.
        threads: CPU threads.
        f32_cache: Attention caches in f32, for comparisons; llama.cpp's default is f16.

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: llama.cpp does not load the file.
    """

    def __init__(self, gguf: Path, *, context: int = 512, threads: int = 1, f32_cache: bool = True) -> None:
        try:
            xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, without type stubs
        except ImportError as error:
            raise InputError("running llama.cpp needs xllamacpp", "pip install 'moesaic[llama-cpp]'") from error
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.n_batch = params.n_ubatch = min(context, 512)
        params.port, params.warmup, params.verbosity = 0, False, -1
        params.fit_params = params.ctx_shift = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if f32_cache:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # whatever the binding throws
            raise VerificationError(f"llama.cpp does not load {gguf}: {error}", "report it") from error
        self._letter = self.tokenize("a")[-1]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server = None  # its destructor stops the threads

    def complete(self, prompt: str | list[int], count: int, **options: Any) -> dict[str, Any]:
        """A greedy completion of ``count`` tokens, as the server answers it."""
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, **options}
        answer = self._server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "choices" not in answer and "timings" not in answer:
            raise VerificationError(f"llama.cpp cannot run this model: {str(answer)[:300]}", "report it")
        return answer

    def log_probabilities(self, ids_W: list[int], candidates: int, *, reuse: bool) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [C] of the likeliest tokens after ``ids_W``, best first.

        ``reuse``: keep the cache of the common beginning with the last call, so that only new tokens are computed.
        """
        # Tokens that end the text, or hold part of a character, come without probabilities, which are taken before
        # the bias: so an ordinary one is forced.
        bias = [[self._letter, 1e9]]
        answer = self.complete(ids_W, 1, n_probs=candidates, cache_prompt=reuse, logit_bias=bias)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return torch.tensor([entry["id"] for entry in top]), torch.tensor([entry["logprob"] for entry in top])

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; ``special``: with the tokens that begin and end a text."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["tokens"]


@dataclass(frozen=True)
class LlamaCppParity:
    """llama.cpp against the reference on the same tokens.

    Attributes:
        tokens: Positions compared.
        candidates: Likeliest tokens of llama.cpp that were compared at each.
        max_delta: Largest |log-probability difference|. Where two experts are nearly equal, rounding decides, and a
            token that takes the other one differs visibly.
        median: Median over positions of each one's largest difference.
        top1: Share of positions whose likeliest next token is the same.
        mean_kl: Mean KL divergence of llama.cpp's distribution from the reference's over the candidates, nats.
    """

    tokens: int
    candidates: int
    max_delta: float
    median: float
    top1: float
    mean_kl: float

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)

    def require_exact(self, name: str) -> None:
        """Raise VerificationError when an f32 file does not compute the reference's function."""
        if not (self.median <= EXACT_MEDIAN and self.mean_kl <= EXACT_KL):
            raise VerificationError(
                f"{name} in llama.cpp differs: log-probabilities by {self.median:.1e} (median), "
                f"mean KL {self.mean_kl:.1e}",
                "report it",
            )


def llama_cpp_parity(
    gguf: Path,
    ids_NW: Tensor,
    reference: Callable[[Tensor], Tensor],
    *,
    candidates: int = 64,
    threads: int = 1,
    reuse: bool = True,
) -> LlamaCppParity:
    """Compare a GGUF in llama.cpp with ``reference``, which maps ids_W to logits_WV.

    ``reuse``: every position is one decoding step on the cache of those before it; else each is a prompt of its own,
    computed as a batch (for short windows).

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: llama.cpp does not load or run the file.
    """
    deltas: list[float] = []
    agreed, divergence = 0, 0.0
    with LlamaCpp(gguf, context=ids_NW.shape[1] + 8, threads=threads) as engine:
        for ids_W in ids_NW:
            expected_WV = reference(ids_W).double()
            for position, expected_V in enumerate(expected_WV, start=1):
                ids_C, actual_C = engine.log_probabilities(ids_W[:position].tolist(), candidates, reuse=reuse)
                expected_C = expected_V[ids_C].log_softmax(-1)
                difference_C = (expected_C - actual_C.double().log_softmax(-1)).nan_to_num(nan=float("inf"))
                deltas.append(difference_C.abs().max().item())
                divergence += (expected_C.exp() * difference_C).sum().item()
                agreed += int(ids_C[0] == expected_V.argmax())
    delta_T = torch.tensor(deltas)
    return LlamaCppParity(
        tokens=len(deltas),
        candidates=candidates,
        max_delta=delta_T.max().item(),
        median=delta_T.median().item(),
        top1=agreed / len(deltas),
        mean_kl=divergence / len(deltas),
    )


def stock_logits(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from ids_W to logits_WV of a stock folder in transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()

    @torch.inference_mode()
    def logits(ids_W: Tensor) -> Tensor:
        return model(ids_W[None], use_cache=False).logits[0]

    return logits

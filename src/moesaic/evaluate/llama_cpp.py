"""Does a GGUF compute in llama.cpp what the folder it was written from computes in transformers?

llama.cpp comes as the wheel ``xllamacpp``: its server, in a process of its own (``llama_cpp_child.py``), as it aborts
on some files. We ask it for the log-probabilities of the likeliest next tokens at every position. Attention caches are
f32, every window begins with an empty one, and the text is fed as token ids. Distributions are compared over these
candidates alone, both normalised anew: llama.cpp sums its normaliser in fp32, which shifts all log-probabilities of a
position by 1e-4 at 50 000 tokens.

Axes: N windows, W tokens per window, V vocabulary, C candidates that llama.cpp names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.differences import Differences
from moesaic.evaluate.engine_parity import EngineParity
from moesaic.evaluate.fresh_process import Child
from moesaic.evaluate.stock import Stock

_CHILD = Path(__file__).with_name("llama_cpp_child.py")


def available() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF in llama.cpp on the CPU, in a process of its own; a context manager.

    Args:
        gguf: The file.
        context: Tokens of context.
        threads: CPU threads.
        f32_cache: Attention caches in f32, for comparisons; llama.cpp's default is f16.

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: llama.cpp does not load the file, aborts, or gives no answer in time; so do all methods.
    """

    def __init__(self, gguf: Path, *, context: int = 512, threads: int = 1, f32_cache: bool = True) -> None:
        if not available():
            raise InputError("running llama.cpp needs xllamacpp", "pip install 'moesaic[llama-cpp]'")
        settings = {"gguf": str(gguf), "context": context, "threads": threads, "f32_cache": f32_cache}
        # -P: the folder of the script is no place to import from. The variable: no debugger starts when it aborts.
        command = [sys.executable, "-P", str(_CHILD), json.dumps(settings)]
        self._child = Child(command, engine="llama.cpp", subject=gguf.name, environment={"GGML_NO_BACKTRACE": "1"})
        try:
            self._child.answer()
            self._letter = self._letter_token()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, error, trace)

    def _letter_token(self) -> int:
        ids = self.tokenize("a")
        if not ids:
            raise VerificationError("llama.cpp makes no token of the letter a", "is the tokenizer that of the model?")
        return ids[-1]

    def _ask(self, **request: Any) -> Any:
        self._child.send(json.dumps(request))
        return json.loads(self._child.answer())

    def complete(self, prompt: str | list[int], count: int, **options: Any) -> dict[str, Any]:
        """A greedy completion of ``count`` tokens, as the server answers it."""
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, **options}
        answer = self._ask(complete=request)
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
        if any(entry["logprob"] is None for entry in top):  # how JSON says NaN
            raise VerificationError("this model gives NaN in llama.cpp", "its numbers are too large for it: try f32")
        return torch.tensor([entry["id"] for entry in top]), torch.tensor([entry["logprob"] for entry in top])

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; ``special``: with the tokens that begin and end a text."""
        return self._ask(tokenize={"content": text, "add_special": special, "parse_special": True})


def llama_cpp_parity(
    gguf: Path,
    ids_NW: Tensor,
    reference: Callable[[Tensor], Tensor],
    *,
    candidates: int = 64,
    threads: int = 1,
    reuse: bool = True,
) -> EngineParity:
    """Compare a GGUF in llama.cpp with ``reference``, which maps ids_W to logits_WV.

    ``reuse``: every position is one decoding step on the cache of those before it in its window; else each is a prompt
    of its own, computed as a batch (for short windows).

    Raises:
        InputError: xllamacpp is not installed.
        VerificationError: llama.cpp does not load or run the file.
    """
    found = llama_cpp_differences(gguf, ids_NW, reference, candidates=candidates, threads=threads, reuse=reuse)
    engine = f"llama.cpp (xllamacpp {version('xllamacpp')})"
    return EngineParity.of(found, engine=engine, candidates=candidates, windows=len(ids_NW))


def llama_cpp_differences(
    gguf: Path,
    ids_NW: Tensor,
    reference: Callable[[Tensor], Tensor],
    *,
    candidates: int = 64,
    threads: int = 1,
    reuse: bool = True,
) -> Differences:
    """:func:`llama_cpp_parity` token by token: of log-probabilities over the candidates."""
    found: list[tuple[float, bool, float]] = []
    with LlamaCpp(gguf, context=ids_NW.shape[1] + 8, threads=threads) as engine:
        for ids_W in ids_NW:
            expected_WV = reference(ids_W).double()
            for position, expected_V in enumerate(expected_WV, start=1):
                prompt = ids_W[:position].tolist()
                # Nothing of the window before is kept, even if both begin alike.
                ids_C, actual_C = engine.log_probabilities(prompt, candidates, reuse=reuse and position > 1)
                expected_C = expected_V[ids_C].log_softmax(-1)
                difference_C = expected_C - actual_C.double().log_softmax(-1)
                divergence = (expected_C.exp() * difference_C).sum().item()
                delta = difference_C.nan_to_num(nan=float("inf")).abs().max().item()
                found.append((delta, bool(ids_C[0] == expected_V.argmax()), divergence))
    return Differences(*(torch.tensor(part) for part in zip(*found, strict=True)))


def stock_logits(folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from ids_W to logits_WV of a stock folder in transformers, in fp32."""
    return Stock(folder).logits

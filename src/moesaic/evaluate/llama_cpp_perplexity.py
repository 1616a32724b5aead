"""Perplexity of a GGUF in llama.cpp, under the protocol of :mod:`moesaic.evaluate.perplexity`.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from torch import Tensor

from moesaic.errors import InputError
from moesaic.evaluate.fresh_process import answers
from moesaic.evaluate.llama_cpp import available
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name
from moesaic.evaluate.stock import Stock

LONGEST = 512
"""Tokens of llama.cpp's default context."""
_WINDOWS = 4


def llama_cpp_perplexity(gguf: Path, ids_NW: Tensor, name: str) -> Perplexity:
    """What llama.cpp makes of a file, with its own defaults: caches in f16, each window from an empty one.

    Args:
        gguf: The file.
        ids_NW: Token ids; W at most 512.
        name: Of the result.

    Raises:
        InputError: xllamacpp is not installed, or windows are longer than 512 tokens.
        VerificationError: llama.cpp does not load or run the file.
    """
    if not available():
        raise InputError("running llama.cpp needs xllamacpp", "pip install 'moesaic[llama-cpp]'")
    if ids_NW.shape[1] > LONGEST:
        raise InputError(f"windows of {ids_NW.shape[1]} tokens", f"llama.cpp is asked for at most {LONGEST}")
    command = [sys.executable, "-P", "-m", "moesaic.evaluate.llama_cpp_perplexity_child"]
    environment = {"GGML_NO_BACKTRACE": "1"}
    windows = [found["losses"] for found in answers(command, gguf, ids_NW, engine="llama.cpp", environment=environment)]
    window_nll = tuple(float(losses.sum()) for losses in windows)
    predicted = sum(len(losses) for losses in windows)
    return Perplexity(name, math.exp(sum(window_nll) / predicted), predicted, window_nll)


def rounding_cost(gguf: Path, folder: Path) -> tuple[Perplexity, Perplexity]:
    """Perplexity of ``folder`` in transformers in fp32, and of the file that was written from it in llama.cpp.

    On 4 windows of the evaluation text. Raises as :func:`llama_cpp_perplexity` does.
    """
    model = Stock(folder).model
    config = model.config
    window = min(LONGEST, int(config.max_position_embeddings))
    ids_NW = parity_ids(folder, int(config.vocab_size), window, _WINDOWS)
    name = protocol_name("wikitext2-raw/test", window, _WINDOWS)
    return perplexity(model, ids_NW, name), llama_cpp_perplexity(gguf, ids_NW, name)

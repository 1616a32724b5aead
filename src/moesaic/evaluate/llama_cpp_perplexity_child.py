"""Log-likelihoods of token windows in llama.cpp; in a process of its own, which may abort.

    python -m moesaic.evaluate.llama_cpp_perplexity_child FILE WORK

 Reads ``ids`` from WORK/ids.safetensors. For every window it writes ``losses``, one for every
token but the first, to WORK/result.safetensors, prints ``@ready`` and waits for a line.

xllamacpp's server says nothing of a prompt's tokens, so the C functions are called. Parameters are llama.cpp's
defaults: a context of 512 tokens, caches in f16, flash attention where it has it. They are passed on as they are, so
what is in them need not be known here.

Axes: W tokens per window, V vocabulary.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from moesaic.evaluate.llama_cpp_library import library, thread_count


class _Parameters(ctypes.Structure):
    """llama.cpp's parameters, which end somewhere before this does."""

    _fields_ = [("bytes", ctypes.c_char * 4096)]


class Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("count", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int32
SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Parameters]),
    "llama_set_n_threads": (None, [_POINTER, _WHOLE, _WHOLE]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_WHOLE, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_decode": (_WHOLE, [_POINTER, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
}


def main(gguf: str, work: Path) -> None:
    """Answer every window."""
    llama = library(SIGNATURES)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(gguf.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit("it does not load")
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    llama.llama_set_n_threads(context, thread_count(), thread_count())
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for ids_W in load_file(work / "ids.safetensors")["ids"].astype(np.int32):
        save_file({"losses": losses(llama, context, vocabulary, ids_W)}, work / "result.safetensors")
        print("@ready", flush=True)
        sys.stdin.readline()


def losses(llama: Any, context: Any, vocabulary: int, ids_W: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every token but the first, from an empty cache."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    wanted = np.ones(len(ids_W), np.int8)
    ids_W = np.ascontiguousarray(ids_W)
    batch = Batch(len(ids_W), token=ids_W.ctypes.data, logits=wanted.ctypes.data)
    if code := llama.llama_decode(context, batch):
        sys.exit(f"llama_decode gave {code}")
    logits_WV = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids_W), vocabulary))[:-1]
    largest_W = logits_WV.max(1)
    normaliser_W = np.log(np.exp(logits_WV - largest_W[:, None]).sum(1, dtype=np.float64)) + largest_W
    return normaliser_W - np.take_along_axis(logits_WV, ids_W[1:, None], 1)[:, 0]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""One model in one engine, timed as it is told; in a process of its own.

    python child.py '{"engine": "llama.cpp", "model": "model.gguf", "threads": 1, "sequences": 8, "context": 160}'

Prints ``@null`` when the model is loaded. Then every line on standard input is a request: ``{"ids": [[...], ...],
"steps": 16}``, prompts of equal length. The answer is a line that begins with ``@``: seconds of the prompts, seconds of
each decoded step of all sequences together, and megabytes that the process holds more than before it loaded the model,
the pages of a mapped file that it has read among them.

Axes: B sequences, W tokens of a prompt.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def resident_megabytes() -> float:
    """What this process holds now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else 0.0


class InLlamaCpp:
    """A GGUF in llama.cpp, through its C functions, with its defaults but for the size of the context."""

    def __init__(self, model: str, threads: int, sequences: int, context: int) -> None:
        from moesaic.evaluate.llama_cpp_library import library
        from moesaic.evaluate.llama_cpp_perplexity_child import SIGNATURES

        counts = {name: (ctypes.c_uint32, [ctypes.c_void_p]) for name in ("llama_n_ctx", "llama_n_seq_max")}
        self._llama: Any = library({**SIGNATURES, **counts})
        self._llama.llama_backend_init()
        loaded = self._llama.llama_model_load_from_file(model.encode(), self._llama.llama_model_default_params())
        if not loaded:
            sys.exit("it does not load")
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(loaded))
        parameters = self._llama.llama_context_default_params()
        # The first fields are n_ctx, n_batch, n_ubatch and n_seq_max, as their defaults show.
        first = (ctypes.c_uint32 * 4).from_buffer(parameters)
        if list(first) != [512, 2048, 512, 1]:
            sys.exit(f"the parameters of this llama.cpp begin with {list(first)}")
        first[0], first[3] = sequences * (-(-context // 256) * 256), sequences
        self._context = self._llama.llama_init_from_model(loaded, parameters)
        if not self._context or self._llama.llama_n_seq_max(self._context) != sequences:
            sys.exit(f"no context of {sequences} sequences")
        self._llama.llama_set_n_threads(self._context, threads, threads)
        self._position = 0

    def prefill(self, ids_BW: np.ndarray) -> np.ndarray:
        """Read the prompts into empty caches; the likeliest next tokens [B]."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._position = 0
        return self.step(ids_BW)

    def step(self, ids_BW: np.ndarray) -> np.ndarray:
        """Read the next tokens of every sequence; the likeliest ones after them [B]."""
        from moesaic.evaluate.llama_cpp_perplexity_child import Batch

        rows, width = ids_BW.shape
        count = rows * width
        ids = np.ascontiguousarray(ids_BW, np.int32)
        positions = np.tile(np.arange(self._position, self._position + width, dtype=np.int32), rows)
        each, owner = np.ones(count, np.int32), np.repeat(np.arange(rows, dtype=np.int32), width)
        owners = (owner.ctypes.data + owner.itemsize * np.arange(count)).astype(np.uint64)  # an address per token
        wanted = np.zeros((rows, width), np.int8)
        wanted[:, -1] = 1
        arrays = {"token": ids, "pos": positions, "n_seq_id": each, "seq_id": owners, "logits": wanted}
        batch = Batch(count, **{name: array.ctypes.data for name, array in arrays.items()})
        if code := self._llama.llama_decode(self._context, batch):
            sys.exit(f"llama_decode gave {code}")
        self._position += width
        logits = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self._vocabulary)).argmax(1)


class InTransformers:
    """A folder in transformers, in the type of its weights, its prompts as its config says."""

    def __init__(self, model: str, threads: int, sequences: int, context: int) -> None:
        import torch

        from moesaic.checkpoint.loading import load_model

        torch.set_num_threads(threads)
        self._torch, self._cache = torch, None
        self._model = load_model(Path(model), "auto")
        if hasattr(self._model, "exact_prefill"):
            self._model.exact_prefill(self._model.config.exact_prefill)

    def prefill(self, ids_BW: np.ndarray) -> np.ndarray:
        """See :class:`InLlamaCpp`."""
        self._cache = None
        return self.step(ids_BW)

    def step(self, ids_BW: np.ndarray) -> np.ndarray:
        """See :class:`InLlamaCpp`."""
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(ids_BW.astype(np.int64))
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1].argmax(-1).numpy()


def timed(engine: Any, ids_BW: np.ndarray, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prompts, and of each step after them."""
    begin = time.perf_counter()
    token_B = engine.prefill(ids_BW)
    first = time.perf_counter()
    decode = []
    for _ in range(steps):
        before = time.perf_counter()
        token_B = engine.step(token_B[:, None])
        decode.append(time.perf_counter() - before)
    return first - begin, decode


def main(settings: dict[str, Any]) -> None:
    """Load the model, then answer until the input ends."""
    with os.fdopen(os.dup(1), "w") as answers:  # engines may print where they like
        os.dup2(2, 1)
        kind = {"llama.cpp": InLlamaCpp, "transformers": InTransformers}[settings.pop("engine")]
        if kind is InTransformers:
            import moesaic.checkpoint.loading  # noqa: F401 (its memory is not the model's)
        empty = resident_megabytes()
        engine = kind(**settings)
        print("@null", file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            prefill, decode = timed(engine, np.array(request["ids"], np.int32), request["steps"])
            found = {"prefill": prefill, "decode": decode, "megabytes": resident_megabytes() - empty}
            print(f"@{json.dumps(found)}", file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

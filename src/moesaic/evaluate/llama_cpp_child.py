"""Runs llama.cpp on one GGUF and answers requests; run by path, in a process of its own, which may abort.

    python llama_cpp_child.py '{"gguf": "model.gguf", "context": 512, "threads": 1, "f32_cache": true}'

Prints ``@null`` when the file is loaded. Then every line on standard input is a request: ``{"complete": {...}}`` with
the options of a completion, or ``{"tokenize": {...}}``. Every answer is a line that begins with ``@``, then JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import urllib.request
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Load the file, then answer until the input ends."""
    # llama.cpp may print where it likes: answers get a way out of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        server = load(**settings)
        say(answers, None)
        for line in sys.stdin:
            request = json.loads(line)
            if "complete" in request:
                found = server.handle_completions(request["complete"])
                say(answers, json.loads(found) if isinstance(found, str | bytes) else found)
            else:
                say(answers, tokenize(server, request["tokenize"]))


def load(gguf: str, context: int, threads: int, f32_cache: bool) -> Any:
    """llama.cpp's server without a port that is known to others."""
    xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, without type stubs
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.n_batch = params.n_ubatch = min(context, 512)
    params.port, params.warmup, params.verbosity = 0, False, -1
    params.fit_params = params.ctx_shift = False
    params.cache_ram_mib = 0  # no store of earlier prompts' caches
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if f32_cache:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        return xllamacpp.Server(params)
    except Exception as error:  # whatever the binding throws
        sys.exit(f"it does not load: {' '.join(str(error).split())}")


def tokenize(server: Any, request: dict[str, Any]) -> list[int]:
    """Token ids, as the server answers them."""
    body = json.dumps(request).encode()
    url = f"{server.listening_address}/tokenize"
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as response:
        return json.load(response)["tokens"]


def say(answers: Any, answer: Any) -> None:
    """One answer, on one line."""
    print(f"@{json.dumps(answer)}", file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

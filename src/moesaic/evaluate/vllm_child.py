"""Prints what vLLM makes of token windows; run by path, by the interpreter that has vLLM, without moesaic.

    python -I vllm_child.py FOLDER WORK

Reads ``ids`` from WORK/ids.safetensors. For every window it writes ``logprobs`` to
WORK/result.safetensors, prints ``@ready`` and waits for a line, so that one window lies on disk at a time.

Axes: N windows, W tokens per window, V vocabulary, C entries that vLLM lists at a position.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def main(folder: str, work: Path) -> None:
    """Answer every window."""
    vllm: Any = importlib.import_module("vllm")  # not installed where types are checked
    ids_NW = load_file(work / "ids.safetensors")["ids"]
    context = ids_NW.shape[1] + 1  # vLLM adds at least one token
    engine = vllm.LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=context,
        max_num_batched_tokens=max(context, 512),
        max_num_seqs=1,  # windows are computed one after the other, each alone
        max_logprobs=-1,
        enable_prefix_caching=False,  # no window sees another's; a cached beginning has no log-probabilities
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    options = vllm.SamplingParams(
        temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False
    )
    for ids_W in ids_NW:
        answer = engine.generate({"prompt_token_ids": ids_W.tolist()}, options, use_tqdm=False)[0]
        logprobs_WV = np.full((len(ids_W), vocabulary), np.nan, np.float32)
        # The prompt's entry 0 is empty: nothing comes before the first token.
        fill(logprobs_WV[:-1], answer.prompt_logprobs, first=1)
        fill(logprobs_WV[-1:], answer.outputs[0].logprobs, first=0)
        del answer
        save_file({"logprobs": logprobs_WV}, work / "result.safetensors")
        print("@ready", flush=True)
        sys.stdin.readline()


def fill(logprobs_WV: np.ndarray, listed: Any, *, first: int) -> None:
    """Spread vLLM's flat list of (token id, log-probability) over the vocabulary, from position ``first`` on."""
    for row_V, start, end in zip(logprobs_WV, listed.start_indices[first:], listed.end_indices[first:], strict=True):
        ids_C = np.asarray(listed.token_ids[start:end])
        row_V[ids_C] = listed.logprobs[start:end]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

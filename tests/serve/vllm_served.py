"""What vLLM generates from a folder, with log-probabilities; run by the interpreter that has vLLM and moesaic.

    python vllm_served.py FOLDER PROMPTS.json OUT.safetensors TOKENS

Prefix caching and continuous batching are on: two requests at a time, 32 tokens in a batch, so that prompts come in
pieces and beside tokens that are being generated. All prompts are asked twice, the second time with their beginnings
cached. For every request OUT holds ``tokens.N`` [G] and ``logprobs.N`` [G, V].

Axes: G generated tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def main(folder: str, prompts: str, out: str, count: int) -> None:
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=96,
        max_num_batched_tokens=32,
        max_num_seqs=2,
        max_logprobs=-1,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
    )
    options = vllm.SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    with open(prompts) as file:  # noqa: PTH123
        asked = [{"prompt_token_ids": ids} for ids in json.load(file)]
    found = {}
    answers = [answer for _ in range(2) for answer in engine.generate(asked, options, use_tqdm=False)]
    for number, answer in enumerate(answers):
        listed = answer.outputs[0].logprobs
        logprobs_GV = np.full((count, vocabulary), np.nan, np.float32)
        for row_V, start, end in zip(logprobs_GV, listed.start_indices, listed.end_indices, strict=True):
            row_V[np.asarray(listed.token_ids[start:end])] = listed.logprobs[start:end]
        found[f"tokens.{number}"] = np.asarray(answer.outputs[0].token_ids)
        found[f"logprobs.{number}"] = logprobs_GV
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))

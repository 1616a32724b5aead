"""Speed of GGUF files in llama.cpp beside each other, in turn and in one run.

All files are loaded at once. Per round each computes the same new prompt and decodes from it, in an order that is
shuffled anew. The attention cache is llama.cpp's default, f16.

Axis: W tokens of a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from moesaic.calibration.samples import evaluation_text
from moesaic.errors import InputError
from moesaic.evaluate.llama_cpp import LlamaCpp
from moesaic.evaluate.speed import Speed


def measure_files(
    files: Sequence[Path],
    *,
    threads: int,
    prompt: int,
    steps: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[Path, list[Speed]]:
    """Speed of every file in every round, after one that is thrown away.

    Args:
        files: Of one vocabulary.
        threads: CPU threads.
        prompt: Tokens of a prompt, text of WikiText-2.
        steps: Tokens to decode after it.
        rounds: Rounds that count.
        advance: Called after every round.

    Raises:
        InputError: xllamacpp is not installed, or the text is too short for so many prompts.
        VerificationError: llama.cpp cannot run a file.
    """
    results: dict[Path, list[Speed]] = {file: [] for file in files}
    shuffled, context = random.Random(0), prompt + steps + 8
    with ExitStack() as stack:
        engines = {
            file: stack.enter_context(LlamaCpp(file, context=context, threads=threads, f32_cache=False))
            for file in files
        }
        ids = next(iter(engines.values())).tokenize(evaluation_text()[: 8 * prompt * (rounds + 1)])
        if len(ids) < prompt * (rounds + 1):
            raise InputError(f"the text has {len(ids)} tokens", "use fewer rounds, or shorter prompts")
        for number in range(rounds + 1):
            ids_W = ids[number * prompt : (number + 1) * prompt]
            for file in shuffled.sample(list(files), len(files)):
                speed = _one_round(engines[file], ids_W, steps)
                if number:
                    results[file].append(speed)
            advance()
    return results


def _one_round(engine: LlamaCpp, ids_W: list[int], steps: int) -> Speed:
    timings = engine.complete(ids_W, steps, ignore_eos=True)["timings"]
    assert timings["prompt_n"] == len(ids_W)
    # The first token comes out of the prefill.
    return Speed(timings["prompt_per_second"], (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3)

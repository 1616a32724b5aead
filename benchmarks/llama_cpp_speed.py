"""How fast are GGUF files in llama.cpp beside each other? Dense and converted, interleaved in one run.

    python -m benchmarks.llama_cpp_speed dense-q8.gguf moe-q8.gguf [--threads 1] [--rounds 8] [--json out.json]

All files are loaded at once. Per round each computes the same new prompt and then decodes from it, in an order that is
shuffled anew, so that load on the machine hits all alike; the attention cache is llama.cpp's default, f16. Reported are
medians over rounds, and ratios to the first file as medians of the ratios within a round, with their range.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.rows import write_rows

from moesaic.calibration.samples import evaluation_text
from moesaic.evaluate.llama_cpp import LlamaCpp


@dataclass(frozen=True)
class Round:
    """Tokens per second of one file in one round."""

    prefill: float
    decode: float


def one_round(engine: LlamaCpp, ids_W: list[int], decode: int) -> Round:
    """Prefill of a prompt, and decoding of ``decode`` tokens after it."""
    timings = engine.complete(ids_W, decode, ignore_eos=True)["timings"]
    assert timings["prompt_n"] == len(ids_W)
    # The first token comes out of the prefill.
    return Round(timings["prompt_per_second"], (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1e3)


def measure(files: list[Path], threads: int, prompt: int, decode: int, rounds: int) -> dict[Path, list[Round]]:
    """Rounds of every file, after one that is thrown away."""
    engines = {file: LlamaCpp(file, context=prompt + decode + 8, threads=threads, f32_cache=False) for file in files}
    ids = next(iter(engines.values())).tokenize(evaluation_text()[: 8 * prompt * (rounds + 1)])
    results: dict[Path, list[Round]] = {file: [] for file in files}
    shuffled = random.Random(0)
    for index in range(rounds + 1):
        window = ids[index * prompt : (index + 1) * prompt]
        for file in shuffled.sample(files, len(files)):
            found = one_round(engines[file], window, decode)
            if index:
                results[file].append(found)
    return results


def summary(results: dict[Path, list[Round]]) -> list[dict[str, object]]:
    """One row per file."""
    first = next(iter(results.values()))
    rows: list[dict[str, object]] = []
    for file, rounds in results.items():
        row: dict[str, object] = {"file": file.name, "megabytes": round(file.stat().st_size / 1e6, 1)}
        for kind in ("prefill", "decode"):
            own = [asdict(entry)[kind] for entry in rounds]
            ratios = [value / asdict(base)[kind] for value, base in zip(own, first, strict=True)]
            row[kind] = round(statistics.median(own), 2)
            row[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
            row[f"{kind}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files of one vocabulary; ratios are to the first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the results there as well")
    given = parser.parse_args()
    rows = summary(measure(given.files, given.threads, given.prompt, given.decode, given.rounds))
    for row in rows:
        figures = [
            f"{kind} {row[kind]:>8} t/s x{row[f'{kind}_ratio']} {row[f'{kind}_ratio_range']}"
            for kind in ("prefill", "decode")
        ]
        print(f"{row['file']:<40} {row['megabytes']:>8} MB", *figures, sep="  ")
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key not in ("files", "json")}
        machine = {"machine": platform.processor() or platform.machine(), "xllamacpp": version("xllamacpp")}
        write_rows(given.json, {"settings": settings | machine, "rows": rows})


if __name__ == "__main__":
    main()

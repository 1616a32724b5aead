"""How fast are GGUF files in llama.cpp beside each other? Dense and converted, interleaved in one run.

    python -m benchmarks.llama_cpp_speed dense-q8.gguf moe-q8.gguf [--threads 1] [--rounds 8] [--json out.json]

All files are loaded at once. Per round each computes the same new prompt and then decodes from it, in an order that is
shuffled anew, so that load on the machine hits all alike; the attention cache is llama.cpp's default, f16. Reported are
medians over rounds, and ratios to the first file as medians of the ratios within a round, with their range.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.rows import write_rows

from moesaic.evaluate.llama_cpp_speed import measure_files
from moesaic.evaluate.speed import Speed


def summary(results: dict[Path, list[Speed]]) -> list[dict[str, object]]:
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
    counts = {"threads": given.threads, "prompt": given.prompt, "steps": given.decode, "rounds": given.rounds}
    rows = summary(measure_files(given.files, **counts))
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

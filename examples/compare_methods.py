"""Several methods at one share of neurons, measured on the same windows, side by side on one page.

python examples/compare_methods.py MODEL FOLDER [--active 0.5] [--windows N] [--window TOKENS]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moesaic
from moesaic.jobs.compare import compare_outputs
from moesaic.report.compare import comparison_rows, names_of

METHODS = ("neuron_experts", "token_clusters", "static")


def main(arguments: list[str] | None = None) -> None:
    """Convert by every method what is not there yet, measure, print the table, write compared.html."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args(arguments)

    args.folder.mkdir(parents=True, exist_ok=True)
    outputs = []
    for method in args.methods:
        out = args.folder / method
        if not out.exists():
            moesaic.convert(args.model, out, method=method, options={"active": args.active}, target="moesaic")
        moesaic.evaluate_model(out, baseline=args.model, window=args.window, limit=args.windows)
        outputs.append(out)

    page = args.folder / "compared.html"
    compared = compare_outputs(outputs, page)
    for name, *values in [["", *names_of(compared.models)], *comparison_rows(compared.models, compared.paired)]:
        print(f"{name:60}", *(f"{value:24}" for value in values))
    print(f"page: {page}")


if __name__ == "__main__":
    main()

"""One conversion from Python: convert, measure beside the dense model, write the report.

python examples/convert_and_measure.py MODEL OUT [--method M] [--active 0.5] [--windows N] [--window TOKENS]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moesaic
from moesaic.jobs.report import report


def main(arguments: list[str] | None = None) -> None:
    """Convert, measure, report; prints the ratio of perplexities."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="neuron_experts")
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args(arguments)

    made = moesaic.convert(args.model, args.out, method=args.method, options={"active": args.active})
    print(f"{made.output}: {len(made.blueprint.sites)} FFNs, architecture {made.target}")

    results = moesaic.evaluate_model(made.output, baseline=args.model, window=args.window, limit=args.windows)
    ratio = results["perplexity"]["model"]["ratio_to_dense"]
    print(f"{results['protocol']}: {ratio['ratio']:.3f} times the dense model's perplexity")
    print(f"report: {report(made.output, baseline=args.model)}")


if __name__ == "__main__":
    main()

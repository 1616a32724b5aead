"""What MLPMoE's slicing, Fractal Fade and Compensated Pruning do to a real model: the table of its docs page.

    python -m benchmarks.mlpmoe MODEL [--windows 8] [--window 1024] [--dtype float32] [--only fade slices]

MODEL is a local folder. Prints a Markdown table: share of zeros in the FFNs, proxy perplexity and its change with a
95 % interval, WikiText-2 perplexity.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows
from moesaic.evaluate.proxy import ProxyPerplexity, proxy_change, proxy_perplexity
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.materialise.apply import apply_blueprint
from moesaic.materialise.pack import pack

FADE = {"fade_max": 0.4}
PRUNE = {"keep": 28}
CALIBRATION = CalibrationConfig(tokens=2048, window=1024)  # only the oracle factor reads text
SETTINGS: dict[str, dict[str, Any]] = {
    "slices, contiguous": {},
    "slices, norm-sorted": {"order": "norm-sorted"},
    "fade weight/matrix": FADE,
    "fade weight/row": FADE | {"fade_scope": "row"},
    "fade weight/branch": FADE | {"fade_scope": "branch"},
    "fade weight/matrix, norm-sorted": FADE | {"order": "norm-sorted"},
    "fade weight/matrix, dyadic": FADE | {"fade_schedule": "dyadic"},
    "fade neuron": FADE | {"fade_unit": "neuron"},
    "fade neuron, norm-sorted": FADE | {"fade_unit": "neuron", "order": "norm-sorted"},
    "prune none": PRUNE | {"prune_factor": "none"},
    "prune sqrt": PRUNE | {"prune_factor": "sqrt"},
    "prune energy": PRUNE | {"prune_factor": "energy"},
    "prune ratio": PRUNE | {"prune_factor": "ratio"},
    "prune per_channel": PRUNE | {"prune_factor": "per_channel"},
    "prune oracle": PRUNE | {"prune_factor": "oracle"},
    "prune none, norm-sorted": PRUNE | {"prune_factor": "none", "order": "norm-sorted"},
}


def main() -> None:
    """Evaluate the dense model, then every setting on a fresh copy of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="*", default=[""], help="run the settings whose name contains one of these")
    arguments = parser.parse_args()

    folder = Path(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids_NW = token_windows(tokenizer, evaluation_text(), arguments.window, arguments.windows)
    name = protocol_name("wikitext2-raw/test", arguments.window, arguments.windows)

    def measure(blueprint: Blueprint | None) -> tuple[ProxyPerplexity, Perplexity]:
        gc.collect()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if blueprint is not None:
            apply_blueprint(model, blueprint, read_anatomy(model.config.to_dict()))
        return proxy_perplexity(model, tokenizer), perplexity(model, ids_NW, name)

    dense_proxy, dense = measure(None)
    print(f"torch {torch.__version__}, {arguments.dtype}, {dense_proxy.name}, {name}\n")
    print("| setting | zeros in FFN | proxy (micro) | change, % | WikiText-2 | ratio to dense |")
    print("|---|---|---|---|---|---|")
    print(f"| dense | | {dense_proxy.micro:.3f} | | {dense.value:.3f} | |", flush=True)
    for setting, options in SETTINGS.items():
        if not any(part in setting for part in arguments.only):
            continue
        blueprint = decide(
            prepare(check_request(folder, ConvertSettings(method="mlpmoe", options=options, calibration=CALIBRATION)))
        )
        removed, c = account(folder, blueprint)
        proxy, wiki = measure(blueprint)
        change, ratio = proxy_change(proxy, dense_proxy), compare(wiki, dense)
        label = f"{setting} (c {c:.3f})" if options.get("prune_factor") == "oracle" else setting
        print(
            f"| {label} | {100 * removed:.2f} % | {proxy.micro:.3f} | {change.percent:+.4f} [{change.low:+.3f}, "
            f"{change.high:+.3f}] | {wiki.value:.3f} | {ratio.ratio:.5f} |",
            flush=True,
        )


def account(folder: Path, blueprint: Blueprint) -> tuple[float, float]:
    """Share of zeros in the FFNs of the whole model (removed neurons are zeros), and the mean c over layers."""
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    left = total = 0
    for site in anatomy.sites:
        weights = load_ffn(checkpoint, site, anatomy.activation)
        left += sum(int(tensor.count_nonzero()) for tensor in pack(weights, blueprint.sites[site.path]).values())
        total += sum(tensor.numel() for tensor in weights.tensors().values())
    scales = [plan.expert_scale for plan in blueprint.sites.values()]
    return 1 - left / total, sum(1.0 if c_N is None else float(c_N[0].mean()) for c_N in scales) / len(scales)


if __name__ == "__main__":
    main()

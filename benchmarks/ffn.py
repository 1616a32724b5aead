"""How fast is one converted FFN beside the dense FFN and beside transformers' own expert implementations?

    python -m benchmarks.ffn [--threads 2] [--layout S2A2E8] [--tokens 1 16 512] [--json out.json]

Everything runs interleaved in one process: per round every contender computes the same new inputs once, in an order
that is shuffled anew, so that load on the machine and leftovers in the caches hit all alike. Reported are the median
over rounds and its ratio to dense.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.rows import write_rows
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2MoeConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moesaic.blueprint.layout import Layout
from moesaic.nn.modeling_moesaic import MoEFeedForward

STOCK = ("eager", "grouped_mm", "batched_mm")
BATCHED_LIMIT = 16  # batched_mm copies the weights once per token and choice: beyond this it only fills memory


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    rows = [measure(args, dtype, tokens) for dtype in args.dtypes for tokens in args.tokens]
    conditions = {
        "shape": f"{args.d_model} x {args.d_ff}",
        "layout": str(args.layout),
        "router": args.router,
        "threads": args.threads,
        "clock": args.clock,
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(markdown(rows, conditions))
    if args.json is not None:
        write_rows(args.json, {"conditions": conditions, "rows": rows})


def measure(args: argparse.Namespace, dtype: str, tokens: int) -> dict[str, Any]:
    """One row: medians in microseconds, ratios to dense, and the floor of the work that a token cannot avoid."""
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    contenders = build(args, torch_dtype)
    if tokens > BATCHED_LIMIT:
        contenders.pop("batched_mm", None)
    shape = (1, tokens, args.d_model)
    with torch.inference_mode():
        micros = _interleaved(contenders, shape, torch_dtype, _rounds(args, tokens), _CLOCKS[args.clock])
    dense = micros["dense"]
    stock = max(dense / micros[name] for name in STOCK if name in micros)
    return {
        "dtype": dtype,
        "tokens": tokens,
        "micros": {name: round(value, 1) for name, value in micros.items()},
        "dense_over": {name: round(dense / value, 3) for name, value in micros.items() if name != "dense"},
        "ours_over_best_stock": round(dense / micros["moesaic"] / stock, 3),
        "floor": floor(args, torch_dtype, torch.randn(tokens, args.d_model), contenders["moesaic"]),
    }


def build(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The contenders by name: the dense FFN, and its size as our module and as stock blocks, with random routers."""
    layout, d_model, d_ff = args.layout, args.d_model, args.d_ff
    width, shared = d_ff // layout.units, d_ff // layout.units * layout.shared
    dense = Qwen2MLP(Qwen2Config(hidden_size=d_model, intermediate_size=d_ff, hidden_act="silu"))
    spec = {
        "neurons": d_ff,
        "shared": shared,
        "experts": layout.routed,
        "expert_width": width,
        "top_k": layout.active,
        "router": args.router,
        "router_tensors": ["weight"] if args.router == "linear" else ["gate", "up"],
        "normalise_input": False,
        "gate": "uniform",
        "selection_bias": False,
        "gated": True,
        "gate_bias": False,
        "up_bias": False,
        "down_bias": False,
    }
    ours = MoEFeedForward(spec, d_model, "silu")
    contenders: dict[str, nn.Module] = {"dense": dense, "moesaic": ours}
    for implementation in STOCK:
        options: dict[str, Any] = {"experts_implementation": implementation}
        config = Qwen2MoeConfig(
            hidden_size=d_model,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=shared,
            num_experts=layout.routed,
            num_experts_per_tok=layout.active,
            norm_topk_prob=True,
            **options,
        )
        contenders[implementation] = Qwen2MoeSparseMoeBlock(config)
    for module in contenders.values():
        module.to(dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    return contenders


def floor(args: argparse.Namespace, dtype: torch.dtype, x_TD: Tensor, ours: nn.Module) -> dict[str, float]:
    """The work that cannot be avoided: weights that these tokens read, arithmetic, and dense over each of them."""
    assert isinstance(ours, MoEFeedForward)
    idx_TK, _ = ours.route(x_TD)
    read = ours.shared + len(idx_TK.unique()) * ours.width
    used = ours.shared + ours.top_k * ours.width
    mebibytes = 3 * args.d_model * args.d_ff * dtype.itemsize / 2**20
    return {
        "weights_mib_dense": round(mebibytes, 1),
        "weights_mib_active": round(mebibytes * read / args.d_ff, 1),
        "gflop_dense": round(6 * args.d_model * args.d_ff * len(x_TD) / 1e9, 3),
        "gflop_active": round(6 * args.d_model * used * len(x_TD) / 1e9, 3),
        "ratio_by_bytes": round(args.d_ff / read, 2),
        "ratio_by_flops": round(args.d_ff / used, 2),
    }


def markdown(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> str:
    """The rows as a table: dense time over each contender's time, so more is better and 1 is dense."""
    columns = ["dtype", "tokens", "dense us", "moesaic", *STOCK, "moesaic / best stock", "limit: bytes", "limit: FLOPs"]
    table = [columns, ["---"] * len(columns)]
    for row in rows:
        ratios, limits = row["dense_over"], row["floor"]
        stock = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in STOCK]
        table.append(
            [row["dtype"], f"{row['tokens']}", f"{row['micros']['dense']:.0f}", f"**{ratios['moesaic']:.2f}**", *stock]
            + [f"{x:.2f}" for x in (row["ours_over_best_stock"], limits["ratio_by_bytes"], limits["ratio_by_flops"])]
        )
    lines = [", ".join(f"{key} {value}" for key, value in conditions.items()), ""]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in table])


_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def _interleaved(
    contenders: dict[str, nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Median microseconds per call of each contender. Inputs are new in each round, so that routing is, as in use."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for turn in range(-2, rounds):  # two rounds to warm up
        shuffle(order)
        x = torch.randn(shape).to(dtype)
        for name in order:
            begin = clock()
            contenders[name](x)
            elapsed = clock() - begin
            if turn >= 0:
                times[name].append(elapsed)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def _rounds(args: argparse.Namespace, tokens: int) -> int:
    return args.rounds or max(7, min(101, 8192 // tokens))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512, 4096])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--layout", type=Layout.parse, default=Layout(2, 2, 8), help="SxAyEz")
    parser.add_argument("--d-model", type=int, default=896)
    parser.add_argument("--d-ff", type=int, default=4864, help="must be a multiple of the layout's units")
    parser.add_argument("--router", default="linear", choices=["linear", "gated"])
    parser.add_argument("--rounds", type=int, help="default: by the number of tokens, 7 to 101")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(_CLOCKS),
        help="cpu: processor time, for a busy machine with --threads 1",
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if args.d_ff % args.layout.units:
        parser.error(f"--d-ff {args.d_ff} is not a multiple of the {args.layout.units} units of {args.layout}")
    return args


if __name__ == "__main__":
    main()

"""How fast is one converted FFN beside the dense FFN and beside transformers' own expert implementations?

    python -m benchmarks.ffn [--threads 2] [--layout S2A2E8] [--tokens 1 16 512] [--device cuda] [--json out.json]

Rows: the dense FFN, what the runtime chooses, each path of its table (``moesaic.nn.moesaic_paths.PATHS``) forced, for
disjoint experts and for a union of overlapping ones, and stock transformers.

Everything runs interleaved in one process: per round every contender computes the same new inputs once, in an order
that is shuffled anew, so that load on the machine and leftovers in the caches hit all alike. Reported are the median
over rounds and its ratio to dense.

Axes: T tokens, D model width, F neurons, E experts, U neurons of the union.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
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
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_paths import PATHS, choose
from moesaic.nn.moesaic_union import UnionFeedForward, build_feed_forward

LAYOUTS = {"moesaic": False, "moesaic, union": True}
"""Our modules, and whether their experts overlap."""
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
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(markdown(rows, conditions))
    if args.json is not None:
        write_rows(args.json, {"conditions": conditions, "rows": rows})


def measure(args: argparse.Namespace, dtype: str, tokens: int) -> dict[str, Any]:
    """Medians in microseconds, ratios to dense, and the floor of the work that a token cannot avoid."""
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    contenders = build(args, torch_dtype, tokens)
    with torch.inference_mode():
        micros = _interleaved(contenders, args, torch_dtype, tokens)
    x_TD, _ = _inputs(args, torch_dtype, tokens)
    with torch.no_grad():
        chosen = {label: choose(x_TD, contenders[label]).name for label in LAYOUTS}
    dense = micros["dense"]
    return {
        "dtype": dtype,
        "tokens": tokens,
        "chosen": chosen,
        "micros": {name: round(value, 1) for name, value in micros.items()},
        "dense_over": {name: round(dense / value, 3) for name, value in micros.items() if name != "dense"},
        "floor": floor(args, torch_dtype, x_TD, contenders["moesaic"]),
    }


def build(args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """The contenders by name: the dense FFN, and its size as our modules and as stock blocks, with random routers."""
    layout, d_model, d_ff = args.layout, args.d_model, args.d_ff
    width, shared = d_ff // layout.units, d_ff // layout.units * layout.shared
    dense = Qwen2MLP(Qwen2Config(hidden_size=d_model, intermediate_size=d_ff, hidden_act="silu"))
    contenders: dict[str, Any] = {"dense": dense}
    for label, overlapping in LAYOUTS.items():
        contenders[label] = _ours(args, overlapping=overlapping)
    for implementation in STOCK:
        if implementation == "batched_mm" and tokens > BATCHED_LIMIT:
            continue
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
        module.to(args.device)
    x_TD, _ = _inputs(args, dtype, tokens)
    return contenders | {name: ffn for label in LAYOUTS for name, ffn in _forced(label, contenders[label], x_TD)}


def _ours(args: argparse.Namespace, *, overlapping: bool) -> MoEFeedForward:
    """Disjoint experts of which each token uses K, or overlapping ones as wide as K of those, of which it uses one."""
    layout, width = args.layout, args.d_ff // args.layout.units
    spec = {
        "neurons": args.d_ff,
        "shared": width * layout.shared,
        "experts": layout.routed,
        "expert_width": width * (layout.active if overlapping else 1),
        "top_k": 1 if overlapping else layout.active,
        "union": overlapping,
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
    ffn = build_feed_forward(spec, args.d_model, "silu")
    if isinstance(ffn, UnionFeedForward):
        member_EU = torch.rand(ffn.membership.shape).argsort(dim=1) < spec["expert_width"]
        ffn.membership.copy_(member_EU)
    return ffn


def _forced(label: str, ffn: MoEFeedForward, x_TD: Tensor) -> Iterator[tuple[str, MoEFeedForward]]:
    """A copy of a module for every path that supports the input, which computes by that path alone."""
    with torch.no_grad():
        able = [row.path.name for row in PATHS if row.path.layout == ffn.layout and row.path.supports(x_TD, ffn)]
    for name in able:
        copied = copy.deepcopy(ffn)
        copied.asked = (name,)
        yield f"{label}, {name}", copied


def floor(args: argparse.Namespace, dtype: torch.dtype, x_TD: Tensor, ours: MoEFeedForward) -> dict[str, float]:
    """The work that cannot be avoided: weights that these tokens read, arithmetic, and dense over each of them."""
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
    """A table per dtype: dense time over each contender's time, so more is better and 1 is dense."""
    lines = [", ".join(f"{key} {value}" for key, value in conditions.items())]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        names = dict.fromkeys(name for row in mine for name in row["dense_over"])
        table = [[f"{dtype}, tokens", *(str(row["tokens"]) for row in mine)], ["---"] * (len(mine) + 1)]
        table.append(["dense, us", *(f"{row['micros']['dense']:.0f}" for row in mine)])
        table += [[name, *(_ratio(name, row) for row in mine)] for name in names]
        for limit, key in (("bytes", "ratio_by_bytes"), ("FLOPs", "ratio_by_flops")):
            table.append([f"limit: {limit}", *(f"{row['floor'][key]:.2f}" for row in mine)])
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in table)]
    return "\n".join(lines)


def _ratio(name: str, row: dict[str, Any]) -> str:
    """Dense over a contender, with the path where the runtime chose it; - where it was not measured."""
    if name not in row["dense_over"]:
        return "-"
    ratio = f"{row['dense_over'][name]:.2f}"
    return f"**{ratio}** {row['chosen'][name]}" if name in LAYOUTS else ratio


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def _interleaved(
    contenders: dict[str, nn.Module], args: argparse.Namespace, dtype: torch.dtype, tokens: int
) -> dict[str, float]:
    """Median microseconds per call of each contender. Inputs are new in each round, so that routing is, as in use."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, clock = list(contenders), CLOCKS[args.clock]
    wait = torch.cuda.synchronize if args.device == "cuda" else _nothing
    shuffle = random.Random(0).shuffle
    for turn in range(-2, _rounds(args, tokens)):  # two rounds to warm up
        shuffle(order)
        _, x = _inputs(args, dtype, tokens)
        for name in order:
            wait()
            begin = clock()
            contenders[name](x)
            wait()
            elapsed = clock() - begin
            if turn >= 0:
                times[name].append(elapsed)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def _nothing() -> None:
    """A CPU has finished when a call returns."""


def _inputs(args: argparse.Namespace, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Random x_TD, and the same as a batch of one."""
    x_TD = torch.randn(tokens, args.d_model).to(args.device, dtype)
    return x_TD, x_TD[None]


def _rounds(args: argparse.Namespace, tokens: int) -> int:
    return args.rounds or max(7, min(101, 8192 // tokens))


def cpu_name() -> str:
    """As /proc/cpuinfo names it."""
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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
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
        choices=list(CLOCKS),
        help="cpu: processor time, for a busy machine with --threads 1",
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if args.d_ff % args.layout.units:
        parser.error(f"--d-ff {args.d_ff} is not a multiple of the {args.layout.units} units of {args.layout}")
    return args


if __name__ == "__main__":
    main()

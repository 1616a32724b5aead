"""Everything about the runtime on one GPU, in less than ten minutes and without a network: one JSON.

    python -m benchmarks.gpu --json gpu.json [--device cuda:0] [--model qwen2.5-1.5b] [--minutes 9] [--parts ffn model]
    python -m benchmarks.gpu --dry-run

The parts, in this order, until the minutes are over; what was left out for that is in the file:

* `commands`: `convert`, `verify`, `eval` and `tune` of a tiny model by several methods, on the device and on the CPU.
  Both must give the same ratio of perplexities to within 1 %;
* `ffn`: each form of experts by each path beside torch's dense FFN, and compared with what the CPU computes. Bytes and
  FLOPs are the limits. Weights are random, and so many copies take turns that no cache holds them;
* `model`: decoding after a prompt and reading it, dense beside converted, by each path. Weights are random.

`--dry-run` does the same on a CPU with tiny shapes, with Triton's interpreter where Triton is installed.

Times are wall clock between synchronisations, milliseconds, minimum and median; contenders take turns in a new order
each round. Ratios are dense over contender, of medians.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as transformers may

import torch
import transformers
from benchmarks.gpu_models import FORMS, SHAPES, Shape, converted_model, dense_ffn, dense_model, fresh, moe_ffn
from benchmarks.machine import cpu_name
from benchmarks.rows import write_rows
from torch import Tensor

from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path

TOKENS = (1, 4, 64, 512, 4096)
CACHE_BYTES = 256 * 2**20  # copies of an FFN together, more than any GPU caches
CHECKED = (4, 64)  # numbers of tokens whose output is compared with the CPU's
BOUND = 2e-2
"""Of the largest output, in bf16. The CPU computes the same rounded weights in fp32."""
TORCH = ("masked", "every")
METHODS: dict[str, tuple[str, ...]] = {
    "cmoe": ("--layout", "S3A3E8"),
    "token_clusters": ("--set", "experts=4", "--set", "split=union"),
    "neuron_experts": (),
}
"""What the commands convert by, and with which options."""
TUNED = ("cmoe",)


@dataclass
class Run:
    """What was asked for, the clock, and what was found."""

    device: torch.device
    dry: bool
    deadline: float
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, part: str, /, **row: Any) -> None:
        """A finding of a part."""
        self.found.setdefault(part, []).append(row)
        print(part, *(f"{key}={value}" for key, value in row.items()), flush=True)

    def failed(self, what: str, error: Exception) -> None:
        """An error, which makes the whole run end with 1."""
        self.add("failed", what=what, error=f"{type(error).__name__}: {error}"[:300])

    def late(self) -> bool:
        """Whether the minutes are over."""
        return time.monotonic() > self.deadline

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def times(self, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Milliseconds of each call in each round; two warm up, none in a dry run. A call that fails is left out."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(0 if self.dry else -2, rounds):
            for name in random.Random(turn).sample(list(taken), len(taken)):
                self.wait()
                begin = time.perf_counter()
                try:
                    calls[name]()
                    self.wait()
                except Exception as error:  # one contender's failure is a finding, not the end of the others
                    del taken[name]
                    self.failed(name, error)
                    continue
                if turn >= 0:
                    taken[name].append(1e3 * (time.perf_counter() - begin))
            if self.late():
                break
        return {name: values for name, values in taken.items() if values}


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    begin = time.monotonic()
    run = Run(torch.device("cpu" if args.dry_run else args.device), args.dry_run, begin + 60 * args.minutes)
    with torch.no_grad():  # not inference mode: a model in use was not loaded in it, and its weights may be laid anew
        for part in args.parts:
            try:
                PARTS[part](run, "tiny" if args.dry_run else args.model)
            except Exception as error:  # what was found until then is worth its file
                run.failed(part, error)
    seconds = round(time.monotonic() - begin)
    failures = [row for rows in run.found.values() for row in rows if row.get("right") is False]
    about = {**conditions(run), "seconds": seconds, "right": not failures and "failed" not in run.found}
    if args.json is not None:
        write_rows(args.json, {"conditions": about, **run.found})
    print(about)
    sys.exit(0 if about["right"] else 1)


def conditions(run: Run) -> dict[str, Any]:
    """The machine and the libraries."""
    try:
        import triton  # pyright: ignore[reportMissingImports]

        version = triton.__version__
    except ImportError:
        version = None
    kind = run.device.type
    name = cpu_name() if kind == "cpu" else torch.get_device_module(kind).get_device_name(run.device)
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__, "triton": version}
    return {"device": name, "dry_run": run.dry, **libraries}


def paths(ffn: MoEFeedForward, x_TD: Tensor) -> Iterator[tuple[str, ...]]:
    """The runtime's own choice, and each path that can compute this input."""
    yield ()
    for row in ffn.table:
        if row.path.layout == ffn.layout and row.path.supports(x_TD, ffn):
            yield (row.path.name,)


def measure_ffns(run: Run, _: str) -> None:
    """Part `ffn`: all shapes and forms, few tokens first."""
    shapes = [SHAPES["tiny"]] if run.dry else [SHAPES[name] for name in SHAPES if name != "tiny"]
    for tokens in TOKENS[:2] if run.dry else TOKENS:
        for shape in shapes:
            for form in FORMS:
                if run.late():
                    run.add("left_out", part="ffn", tokens=tokens, shape=shape.ffn, form=form)
                else:
                    measure_ffn(run, shape, form, tokens)


def measure_ffn(run: Run, shape: Shape, form: str, tokens: int) -> None:
    """One form at one shape and number of tokens, by every path, beside dense."""
    dtype = torch.bfloat16
    x_TD = torch.randn(tokens, shape.d_model, device=run.device, dtype=dtype)
    size = 3 * shape.d_model * shape.d_ff * dtype.itemsize
    copies = 1 if run.dry else max(1, CACHE_BYTES // size)
    original = fresh(moe_ffn(shape, form), dtype, run.device)
    contenders = {"dense": [fresh(dense_ffn(shape), dtype, run.device) for _ in range(copies)]}
    for asked in paths(original, x_TD):  # of its own, as a path may lay its weights in another order
        own = [fresh(moe_ffn(shape, form), dtype, run.device, like=original) for _ in range(copies)]
        for ffn in own:
            ffn.asked = asked
        contenders[asked[0] if asked else "chosen"] = own
    right = {}
    if tokens in CHECKED:
        wanted_TD = _on_cpu(shape, form, original, x_TD)
        for name, own in contenders.items():
            if name != "dense":
                off_TD = own[0](x_TD).double().cpu() - wanted_TD
                right[name] = float(off_TD.abs().max() / wanted_TD.abs().max())

    def turn(modules: list[Any]) -> None:
        for module in modules:
            module(x_TD)

    times = run.times({name: partial(turn, own) for name, own in contenders.items()}, 1 if run.dry else 15)
    row = {name: [round(min(ms) / copies, 5), round(statistics.median(ms) / copies, 5)] for name, ms in times.items()}
    dense = row.get("dense", [0, 0])[1]
    run.add(
        "ffn",
        shape=shape.ffn,
        form=form,
        tokens=tokens,
        ms=row,
        dense_over={name: round(dense / median, 3) for name, (_, median) in row.items()},
        limits=_limits(original, x_TD, shape),
        **({"right": all(error < BOUND for error in right.values()), "off": right} if right else {}),
    )


def _on_cpu(shape: Shape, form: str, original: MoEFeedForward, x_TD: Tensor) -> Tensor:
    """What the CPU computes by torch in fp32, of the same rounded weights."""
    ffn = fresh(moe_ffn(shape, form), torch.float32, torch.device("cpu"), like=original)
    with use_path(ffn, *TORCH):
        return ffn(x_TD.float().cpu()).double()


def _limits(ffn: MoEFeedForward, x_TD: Tensor, shape: Shape) -> dict[str, float]:
    """Dense over what cannot be avoided: the neurons that some token wants, and those that a token computes."""
    idx_TK, _ = ffn.route(x_TD)
    table = getattr(ffn, "membership", None)
    if table is None:
        table = torch.eye(ffn.experts, device=x_TD.device).repeat_interleave(ffn.width, dim=1).bool()
    read = ffn.shared + int(table[idx_TK.unique()].any(0).sum())
    used = ffn.shared + float(table.sum(1)[idx_TK].sum(1).float().mean())
    return {"bytes": round(shape.d_ff / max(read, 1), 2), "flops": round(shape.d_ff / max(used, 1.0), 2)}


def measure_models(run: Run, name: str) -> None:
    """Part `model`: prompts of 512 tokens, 64 decoded."""
    prompt, steps, rounds = (8, 1, 1) if run.dry else (512, 64, 5)
    shape = SHAPES[name]
    ids = torch.randint(3, shape.vocab, (1, prompt), device=run.device)
    models: dict[str, Any] = {"dense": dense_model(shape, run.device)}
    models |= {
        form: converted_model(shape, form, run.device) for form in FORMS if form in ("CMoE S2A2E8", "union 50 %")
    }
    ways: dict[str, Callable[[], Any]] = {}
    for label, model in models.items():
        ways[label] = nullcontext
        ffn = next((module for module in model.modules() if isinstance(module, MoEFeedForward)), None)
        if ffn is not None:
            x_TD = torch.empty(1, shape.d_model, device=run.device, dtype=torch.bfloat16)
            for asked in list(paths(ffn, x_TD))[1:]:
                ways[f"{label}, {asked[0]}"] = partial(use_path, model, *asked, *TORCH)
    own = {label: models[label.partition(",")[0]] for label in ways}

    def read(label: str) -> Any:
        with ways[label]():
            return own[label](input_ids=ids, use_cache=True, logits_to_keep=1)

    _report(
        run, name, "prefill", prompt, run.times({label: (lambda label=label: read(label)) for label in ways}, rounds)
    )
    caches = {label: read(label).past_key_values for label in ways if not run.late()}
    token = ids[:, :1]

    def step(label: str) -> None:
        with ways[label]():
            own[label](input_ids=token, past_key_values=caches[label], use_cache=True)

    _report(run, name, "decode", 1, run.times({label: partial(step, label) for label in caches}, steps))


def _report(run: Run, model: str, what: str, tokens: int, times: dict[str, list[float]]) -> None:
    dense = statistics.median(times.get("dense", [0.0]))
    for label, values in times.items():
        median = statistics.median(values)
        row = {"ms": [round(min(values), 4), round(median, 4)], "dense_over": round(dense / median, 3)}
        run.add("model", model=model, what=what, tokens=tokens, contender=label, **row)


def run_commands(run: Run, _: str) -> None:
    """Part `commands`: what the command line computes on the device and on the CPU."""
    from tests.tiny_models import build_tiny

    with tempfile.TemporaryDirectory() as folder:
        dense = build_tiny("llama", Path(folder) / "dense")
        ratios: dict[str, dict[str, float]] = {method: {} for method in METHODS}
        for device in dict.fromkeys(("cpu", str(run.device))):
            for method, options in METHODS.items():
                out = Path(folder) / f"{method}-{device.replace(':', '-')}"
                base, text = ["--baseline", dense], ["--calib", "tiny", "--calib-tokens", 512, "--calib-window", 64]
                train = ["--data", "tiny", "--tokens", 512, "--window", 64, "--steps", 4, "--set", "train.held_out=1"]
                run_command(run, device, "convert", dense, out, "--method", method, *options, *text)
                run_command(run, device, "verify", out, *base)
                said = run_command(run, device, "eval", out, *base, "--window", 64, "--limit", 4, "--controls")
                ratios[method][device] = said["perplexity"]["model"]["ratio_to_dense"]["ratio"]
                if method in TUNED:
                    run_command(run, device, "tune", out, f"{out}-tuned", *base, *train)
        for method, found in ratios.items():
            one, other = (*found.values(), *found.values())[:2]
            run.add("same", method=method, ratios=found, right=abs(one / other - 1) < 0.01)


def run_command(run: Run, device: str, verb: str, *options: object) -> dict[str, Any]:
    """Run a command on a device and say how long it took. Returns what it says as JSON; RuntimeError when it fails."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "moesaic", verb, *map(str, options), "--device", device, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    right = done.returncode == 0
    run.add("commands", verb=verb, on=device, seconds=round(time.monotonic() - begin, 1), right=right)
    if not right:
        raise RuntimeError(f"{verb} on {device}: {done.stderr[-300:]}")
    return json.loads(done.stdout)


PARTS: dict[str, Callable[[Run, str], None]] = {
    "commands": run_commands,
    "ffn": measure_ffns,
    "model": measure_models,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", default="qwen2.5-1.5b", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if not args.dry_run and torch.device(args.device).type != "cpu" and not torch.accelerator.is_available():
        parser.error(f"there is no {args.device} here; --dry-run needs none")
    return args


if __name__ == "__main__":
    main()

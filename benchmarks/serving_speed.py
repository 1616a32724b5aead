"""How fast is a converted model beside its dense one, where people serve them: in transformers and in llama.cpp?

    python -m benchmarks.serving_speed WORK smollm2=MODEL.gguf qwen=FOLDER --prepare --report docs/results/serving_speed

``--prepare`` makes, in the folder WORK and for every model and layout, what is not there yet: a CMoE conversion with
linear routers fitted to the oracle on 1024 tokens (speed hardly depends on which neurons went where, but it does on how
evenly tokens spread, so routers are real ones), as the moesaic architecture, as stock glm4_moe, and as GGUF files of
both dense and converted model by our own writer. Without it, WORK must hold them.

Then, per engine, weight type and number of threads, all contenders run in one process: each round has a new prompt of
WikiText-2 and a new order. Reported are medians over rounds, and ratios to the dense model as medians of the ratios
within a round, with their range. Results are kept in REPORT.json as they come; what is in it is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moesaic
from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.source import resolve_model
from moesaic.evaluate.llama_cpp_speed import measure_files
from moesaic.evaluate.speed import Speed, measure_rounds, median_speed, ratio
from moesaic.jobs.export_gguf import export_gguf

DENSE = "dense"
RECIPE: dict[str, Any] = {
    "method": "cmoe",
    "target": "moesaic",
    "router": {"mode": "oracle", "steps": 10},
    "calibration": {"tokens": 1024, "window": 512},
}
DTYPES = {"transformers": ("float32", "bfloat16"), "llama.cpp": ("q8_0", "f16")}


@dataclass(frozen=True)
class Group:
    """Contenders that run beside each other."""

    engine: str
    model: str
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        """Key in the JSON report."""
        return f"{self.model}, {self.engine}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Workshop:
    """The folder of prepared models, and the layouts that are measured."""

    folder: Path
    sources: dict[str, Path]
    layouts: tuple[str, ...]

    def moe(self, model: str, layout: str, stock: bool) -> Path:
        """Folder of a converted model."""
        return self.folder / f"{model}-{layout}{'-glm' if stock else ''}"

    def gguf(self, model: str, layout: str | None, dtype: str) -> Path:
        """GGUF of a converted model, of the dense one without layout."""
        return self.folder / f"{model}{'' if layout is None else f'-{layout}'}-{dtype}.gguf"

    def prepare(self) -> None:
        """Make what is not there yet."""
        for model, given in self.sources.items():
            dense = resolve_model(str(given))
            tokenizer = given if given.suffix == ".gguf" else None
            for layout in self.layouts:
                own, stock = self.moe(model, layout, False), self.moe(model, layout, True)
                _unless(own, lambda out, dense=dense, layout=layout: _convert(dense, out, layout))
                _unless(stock, lambda out, own=own: moesaic.export(own, out, target="glm4_moe"))
            for dtype in DTYPES["llama.cpp"]:
                for layout in (None, *self.layouts):
                    folder = dense if layout is None else self.moe(model, layout, True)
                    _unless(
                        self.gguf(model, layout, dtype),
                        lambda out, folder=folder, dtype=dtype, tokenizer=tokenizer: export_gguf(
                            folder, out, dtype, tokenizer_gguf=tokenizer
                        ),
                    )

    def contenders(self, group: Group) -> dict[str, Path]:
        """Label -> folder or file; the dense model comes first."""
        if group.engine == "llama.cpp":
            files = {layout or DENSE: self.gguf(group.model, layout, group.dtype) for layout in (None, *self.layouts)}
            return {label if label == DENSE else f"{label} glm4_moe": file for label, file in files.items()}
        found = {DENSE: resolve_model(str(self.sources[group.model]))}
        for layout in self.layouts:
            found[f"{layout} moesaic"] = self.moe(group.model, layout, False)
            found[f"{layout} glm4_moe"] = self.moe(group.model, layout, True)
        return found


def _unless(path: Path, make: Callable[[Path], object]) -> None:
    if not path.exists():
        print(f"preparing {path.name}", file=sys.stderr, flush=True)
        make(path)


def _convert(dense: Path, out: Path, layout: str) -> None:
    moesaic.convert(dense, out, settings={**RECIPE, "options": {"layout": layout}})


def prompts(tokenizer: Any, count: int, length: int) -> Tensor:
    """Consecutive windows of the WikiText-2 test text, int64 [count, length]."""
    ids = tokenizer(evaluation_text()[: 12 * count * length], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def in_transformers(workshop: Workshop, group: Group, prompt: int, decode: int, rounds: int) -> dict[str, list[Speed]]:
    """Rounds of every contender, all in memory at once, with transformers' own defaults."""
    torch.set_num_threads(group.threads)
    paths = workshop.contenders(group)
    dtype = getattr(torch, group.dtype)
    moesaic.register()
    models = {label: AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for label, path in paths.items()}
    ids_RW = prompts(AutoTokenizer.from_pretrained(paths[DENSE]), rounds + 1, prompt)
    found = measure_rounds(models, ids_RW, decode)
    del models
    gc.collect()
    return found


def in_llama_cpp(workshop: Workshop, group: Group, prompt: int, decode: int, rounds: int) -> dict[str, list[Speed]]:
    """Rounds of every contender, all loaded at once."""
    paths = workshop.contenders(group)
    counts = {"threads": group.threads, "prompt": prompt, "steps": decode, "rounds": rounds}
    found = measure_files(list(paths.values()), **counts)
    return {label: found[path] for label, path in paths.items()}


def megabytes(path: Path) -> float:
    """Size of a GGUF or of a folder's weights."""
    files = [path] if path.is_file() else path.glob("model*.safetensors")
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def rows_of(workshop: Workshop, group: Group, found: dict[str, list[Speed]]) -> list[dict[str, Any]]:
    """One row per contender, ready for JSON."""
    rows = []
    for label, rounds in found.items():
        row: dict[str, Any] = {"contender": label, "megabytes": megabytes(workshop.contenders(group)[label])}
        medians = median_speed(rounds).to_dict()
        for kind, value in medians.items():
            row[kind] = round(value, 2)
            compared = ratio(kind, rounds, found[DENSE])
            row[f"{kind}_ratio"] = {key: round(number, 3) for key, number in asdict(compared).items()}
        rows.append(row)
    return rows


def groups(workshop: Workshop, given: argparse.Namespace) -> Iterator[Group]:
    """Everything that was asked for."""
    for model in workshop.sources:
        for engine in given.engines:
            for dtype in DTYPES[engine]:
                for threads in given.threads:
                    yield Group(engine, model, dtype, threads)


def cpu_name() -> str:
    """What /proc/cpuinfo calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    settings = report["settings"]
    lines = [
        "# Serving speed, dense beside converted",
        "",
        f"Prefill of {settings['prompt']} tokens of WikiText-2 and {settings['decode']} greedy tokens after it, batch "
        f"1, {settings['rounds']} rounds and one to warm up, contenders in a new order each round. Tokens per second "
        "are medians; the ratio is that to the dense model in the same round, median [lowest, highest].",
        "",
        f"{settings['cpu']}, {settings['cores']} cores; torch {settings['torch']}, transformers "
        f"{settings['transformers']}, xllamacpp {settings['xllamacpp']}, moesaic {settings['moesaic']}.",
        "",
        "Converted: CMoE with linear routers fitted to the oracle on 1024 tokens. `moesaic` is our runtime in "
        "transformers, `glm4_moe` the stock architecture with exact weights (experts paired with empty twins, which "
        "take memory and are never computed). GGUF files, the dense ones too, are of our writer.",
    ]
    for name, rows in report["groups"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| | MB | prefill t/s | ratio | decode t/s | ratio |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [row["contender"], f"{row['megabytes']:.0f}"]
            for kind in ("prefill", "decode"):
                r = row[f"{kind}_ratio"]
                shown = "1" if row["contender"] == DENSE else f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
                cells += [f"{row[kind]:.1f}", shown]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the prepared models")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="dense models: folder, .gguf or hub id")
    parser.add_argument("--prepare", action="store_true", help="make what WORK does not hold yet")
    parser.add_argument("--layouts", nargs="+", default=["S3A3E8", "S2A2E8"])
    parser.add_argument("--engines", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, default=Path("serving_speed"), help="where .md and .json go")
    return parser.parse_args()


def main() -> None:
    """Measure group by group, and write the report after each."""
    given = arguments()
    logging.disable_progress_bar()
    sources = {name: Path(model) for name, _, model in (entry.partition("=") for entry in given.models)}
    workshop = Workshop(given.work, sources, tuple(given.layouts))
    if given.prepare:
        given.work.mkdir(parents=True, exist_ok=True)
        workshop.prepare()
    settings = {
        **{key: getattr(given, key) for key in ("prompt", "decode", "rounds")},
        **{name: version(name) for name in ("torch", "transformers", "xllamacpp", "moesaic")},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }
    path = given.report.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else {"settings": settings, "groups": {}}
    if kept["settings"] != settings:
        raise SystemExit(f"{path} is of other settings or versions: remove it or choose another --report")
    for group in groups(workshop, given):
        if group.name not in kept["groups"]:
            measured = in_llama_cpp if group.engine == "llama.cpp" else in_transformers
            found = measured(workshop, group, given.prompt, given.decode, given.rounds)
            kept["groups"][group.name] = rows_of(workshop, group, found)
            write_rows(path, kept)
            given.report.with_suffix(".md").write_text(markdown(kept))
            print(json.dumps({group.name: kept["groups"][group.name]}), flush=True)


if __name__ == "__main__":
    main()

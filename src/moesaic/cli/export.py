"""``moesaic export OUT OUT2``: a converted model as a stock architecture or a GGUF, for engines as they are."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, native_line, quiet_libraries, say
from moesaic.errors import InputError
from moesaic.gguf import DTYPES

GGUF = "gguf"


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="export")(run)


def run(
    folder: opt.Folder,
    out: Annotated[
        Path, typer.Argument(metavar="OUT2", help="Folder, or .gguf file, to create; it appears when complete.")
    ],
    to: Annotated[str, typer.Option("--to", help="Architecture, see `moesaic targets OUT`; or gguf.")] = "auto",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="eps, exact_weights or align; repeatable."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished export.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help=f"gguf: {', '.join(DTYPES)}. Default: f16.")] = None,
    tokenizer_gguf: Annotated[
        Path | None, typer.Option("--tokenizer-gguf", help="gguf: copy the tokenizer from this file.")
    ] = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write OUT as a stock architecture, or as a GGUF.

    A GGUF is made of a folder in a stock architecture. The logits of both are compared.
    """
    settings = opt.pairs(options)
    if to == GGUF and (settings or restart):
        raise InputError("--set and --restart are for folders", "leave them out with --to gguf")
    if to != GGUF and (dtype is not None or tokenizer_gguf is not None):
        raise InputError("--dtype and --tokenizer-gguf are for GGUF files", "add --to gguf")
    if to != GGUF and out.suffix == f".{GGUF}":
        from moesaic.checkpoint.reader import Checkpoint
        from moesaic.gguf.architectures import architecture_of

        architecture_of(Checkpoint(folder).config)  # no hint towards what is refused
        raise InputError(f"{out} has the ending of a GGUF, and --to {to} writes a folder", "add --to gguf")
    opt.check_models(folder)
    quiet_libraries(quiet)
    progress = ConsoleProgress(quiet)
    if to == GGUF:
        _gguf(folder, out, dtype or "f16", tokenizer_gguf, progress, as_json)
        return
    from moesaic.jobs.export import export

    done = export(folder, out, target=to, options=settings, restart=restart, progress=progress)
    if as_json:
        emit_json({"output": str(done.output), "target": done.target, "refused": done.refused} | done.results)
        return
    emit(f"{done.output}: {done.target}")
    if "native_parity" in done.results:
        emit(native_line(done.results["native_parity"]))
    say(f"next: moesaic export {shlex.quote(str(done.output))} model.gguf --to gguf, or see docs/serving.md")


def _gguf(
    folder: Path, out: Path, dtype: str, tokenizer_gguf: Path | None, progress: ConsoleProgress, as_json: bool
) -> None:
    from moesaic.jobs.export_gguf import export_gguf

    done = export_gguf(folder, out, dtype, tokenizer_gguf=tokenizer_gguf, progress=progress)
    parity = done.parity
    if as_json:
        report = {"output": str(done.output), "architecture": done.architecture, "bytes": done.nbytes}
        report |= {"dtype": done.dtype, "fallbacks": list(done.fallbacks)}
        if done.perplexity is not None:
            report["perplexity"] = [one.to_dict() for one in done.perplexity]
        emit_json(report | {"llama_cpp_parity": None if parity is None else parity.to_dict()})
        return
    emit(f"{done.output}: {done.architecture}, {done.dtype}, {done.nbytes / 1e6:.0f} MB")
    if parity is None:
        emit(f"not compared with llama.cpp: {done.unchecked}")
    else:
        rounding = "" if parity.bound is None else f", {done.dtype} explains {parity.bound:.1e}"
        figures = f"mean KL {parity.mean_kl:.1e}, median difference {parity.median:.1e}{rounding}"
        emit(f"llama.cpp against transformers: {figures}")
    if done.perplexity is not None:
        before, after = done.perplexity
        emit(f"{after.name}: {before.value:.2f} in transformers, {after.value:.2f} as {done.dtype} in llama.cpp")
    say(f"next: llama-cli -m {shlex.quote(str(done.output))}")

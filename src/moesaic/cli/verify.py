"""``moesaic verify OUT``: is this folder what was written, and does it compute what it should?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, native_line, parity_lines, quiet_libraries
from moesaic.options.device import AUTO

if TYPE_CHECKING:
    from moesaic.jobs.verify import VerifyReport

_WINDOWS = 4


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="verify")(run)


def run(
    folder: opt.Folder,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="The dense model, for parity of logits.")] = None,
    parity: Annotated[
        bool,
        typer.Option(
            "--parity",
            help="A stock architecture: logits in stock transformers, and in vLLM where it is, into OUT/results.json.",
        ),
    ] = False,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="With --parity: windows of 256 tokens. Default: 4.")
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            "--vllm-python", help="With --parity: the Python interpreter that has vLLM (or MOESAIC_VLLM_PYTHON)."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Compute all layers of a large model, not some; needs memory for it in fp32.")
    ] = False,
    device: opt.DeviceName = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check that OUT is whole and, with --baseline, what it computes.

    Hashes, shapes, values and parity. Exit code 3 when anything is wrong.
    """
    quiet_libraries()
    from moesaic.errors import InputError
    from moesaic.evaluate.vllm import find_python
    from moesaic.jobs.native import verify_tensors
    from moesaic.jobs.verify import verify_output

    given = {"--vllm-python": vllm_python, "--windows": windows}
    if not parity and (idle := [name for name, value in given.items() if value is not None]):
        raise InputError(f"{' and '.join(idle)} is for --parity", "add --parity, and --baseline MODEL")
    python = find_python(vllm_python) if parity else None
    report = verify_output(folder, baseline=baseline, full=full, device=device or AUTO)
    apart = None
    if baseline is not None and not parity and _is_stock(folder):  # compared in stock transformers or not at all
        apart = _too_large(folder, baseline)
        parity = apart is None
        if apart is not None:
            verify_tensors(folder, baseline)
    compared = _engines(folder, baseline, windows or _WINDOWS, python) if parity else {}
    if as_json:
        emit_json(report.to_dict() | compared)
        return
    for line in (*_folder_lines(report), *_dense_lines(report, baseline)):
        emit(line)
    if apart is not None:
        emit(f"tensors are those that {baseline} gives; no logits: {apart}; --parity compares them all the same")
    if parity:
        emit(native_line(compared["native_parity"]))
        emit(_vllm_line(compared["vllm_parity"]))
    emit("ok")


def _folder_lines(report: VerifyReport) -> Iterator[str]:
    """What was found in the folder itself."""
    from moesaic.jobs.verify import PROMPT_TOKENS

    yield f"folder: {report.folder}"
    if report.files:
        yield f"files: {report.files} as manifest.json has them, by sha256"
    else:
        yield "files: not hashed, as no manifest.json is of these files"
    yield f"tensors: {report.tensors}, all with finite values and the names and shapes that config.json asks for"
    if report.sites is None:
        yield "FFNs: not looked at, as a stock folder that transformers saved does not say how they were split"
    elif report.partition:
        yield f"FFNs: {report.sites} converted, each a partition of the dense FFN's neurons"
    else:
        yield f"FFNs: {report.sites} converted, no partition of the dense model"
    if report.logits is not None:
        yield f"logits: finite on a prompt of {PROMPT_TOKENS} tokens, the largest {report.logits:.1f}"
    elif report.oracle is None and report.all_on is None:
        yield "logits: not computed, as the model is large; --full computes them"


def _dense_lines(report: VerifyReport, baseline: Path | None) -> Iterator[str]:
    """What was found beside the dense model, and what was not looked for. Of a stock folder others say it."""
    folder = Path(report.folder)
    if baseline is None:
        yield f"not compared with the dense model: {_incomparable(folder) or 'give --baseline MODEL'}"
        return
    if _is_stock(folder):
        return
    yield f"compared with the dense model: {report.checked}"
    yield from parity_lines(report.to_dict(), whole="outputs of layers" not in report.checked)
    if report.all_on is None:
        yield "all experts on not compared with dense: this is no partition, so they need not be alike"
    if report.oracle is None:
        yield "FFNs not computed: faded ones were compared by their tensors"
    yield f"largest difference allowed: {report.tolerance:.0e}"


def _incomparable(folder: Path) -> str | None:
    """Why no dense model can stand beside it, as :func:`moesaic.jobs.verify.verify_output` refuses one."""
    from moesaic.checkpoint.converted import as_written
    from moesaic.checkpoint.mark import tuned
    from moesaic.checkpoint.reader import Checkpoint

    return tuned(Checkpoint(folder).config) or (None if as_written(folder) else "it has no manifest.json")


def _is_stock(folder: Path) -> bool:
    from moesaic.checkpoint.reader import CONFIG, read_json

    return read_json(folder / CONFIG).get("model_type") != "moesaic"


def _too_large(folder: Path, baseline: Path) -> str | None:
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.checkpoint.source import resolve_model
    from moesaic.jobs.native import too_large

    return too_large(Checkpoint(resolve_model(str(baseline))), Checkpoint(folder))


def _engines(folder: Path, baseline: Path | None, windows: int, vllm_python: Path | None) -> dict[str, Any]:
    """Parity in stock transformers and in vLLM (None where it is not to be had), also into results.json."""
    from moesaic.jobs.evaluate import merge_results
    from moesaic.jobs.native import verify_native
    from moesaic.jobs.verify import verify_in_vllm
    from moesaic.staging.results import read_results

    read_results(folder)  # damaged, it is refused before the work
    native = verify_native(folder, baseline, windows=windows)
    merge_results(folder, {"native_parity": native.to_dict()})
    found = None
    if vllm_python is not None:
        found = verify_in_vllm(folder, vllm_python, exact=native.exact, windows=windows).to_dict()
        merge_results(folder, {"vllm_parity": found})
    return {"native_parity": native.to_dict(), "vllm_parity": found}


def _vllm_line(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "vLLM: not compared; name the Python interpreter that has it with --vllm-python"
    return (
        f"{parity['engine']} against stock transformers, {parity['tokens']} tokens: largest difference of "
        f"log-probabilities {parity['max_delta']:.1e}, median {parity['median']:.1e}; same next token "
        f"{parity['top1']:.2%}; mean KL {parity['mean_kl']:.1e}"
    )

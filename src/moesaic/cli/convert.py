"""``moesaic convert MODEL OUT``: the main job."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, native_line, parity_lines, quiet_libraries, say
from moesaic.errors import InputError, MoesaicError

if TYPE_CHECKING:
    from moesaic.jobs.convert import Conversion


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="convert")(run)


def run(
    model: opt.Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to create; it appears when complete and verified.")
    ],
    config: opt.Config = None,
    preset: opt.Preset = None,
    method: opt.Method = None,
    layout: opt.LayoutText = None,
    active: opt.Active = None,
    options: opt.Set = None,
    calib: opt.Calib = None,
    calib_tokens: opt.CalibTokens = None,
    calib_window: opt.CalibWindow = None,
    dense_layers: opt.DenseLayers = None,
    hierarchical: opt.Hierarchical = None,
    whole: opt.Whole = None,
    seed: opt.Seed = None,
    router: opt.RouterText = None,
    target: opt.Target = None,
    device: opt.DeviceName = None,
    align: opt.Align = None,
    memory: opt.Memory = None,
    blueprint: Annotated[
        Path | None,
        typer.Option(
            "--blueprint",
            help="Apply the blueprint of another output, a folder, in place of a method.",
        ),
    ] = None,
    budget: opt.Budget = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away an unfinished run of another conversion.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Send the result there too; see `moesaic push`."),
    ] = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert a dense checkpoint into a MoE checkpoint. Interrupted, the same command resumes."""
    if out.suffix == ".gguf":
        raise InputError(
            f"{out} has the ending of a GGUF, and convert writes a folder",
            f"convert to a folder with --target glm4_moe, then: moesaic export FOLDER {out.name} --to gguf",
        )
    own = {"--preset": preset, "--method": method, "--layout": layout, "--active": active, "--set": options}
    if blueprint is not None and (given := [name for name, value in own.items() if value is not None]):
        instead = "; --budget changes what its experts may use" if active is not None else ""
        raise InputError("a blueprint says already how every FFN is split", f"leave {' and '.join(given)} out{instead}")
    settings = opt.make_settings(
        config=config,
        preset=preset,
        method=method,
        layout=layout,
        active=active,
        options=options,
        calib=calib,
        calib_tokens=calib_tokens,
        calib_window=calib_window,
        dense_layers=dense_layers,
        hierarchical=hierarchical,
        seed=seed,
        router=router,
        target=target,
        align=align,
        budget=budget,
        whole=whole,
        device=device,
        memory=memory,
    )
    from moesaic.jobs.request import check_request
    from moesaic.train.launch import is_worker

    if model.endswith(".gguf"):
        quiet_libraries(quiet)  # transformers dequantises it
    # A slip is answered before torch is imported.
    request = check_request(model, settings, out, blueprint=blueprint)
    if push_to_hub is not None:
        from moesaic.jobs.push import check_push

        check_push(push_to_hub)
    quiet_libraries(quiet)
    from moesaic.jobs.convert import convert_request

    done = convert_request(request, out, restart=restart, progress=ConsoleProgress(quiet))
    if is_worker():
        return
    if push_to_hub is not None:
        _push(done.output, push_to_hub, quiet)
    if as_json:
        emit_json({"output": str(done.output)} | done.results)
        return
    seconds = done.results["conversion"]["seconds"]
    made = f"{len(done.blueprint.sites)} FFNs by {done.blueprint.method}"
    emit(f"{done.output}: {done.target}, {made} in {seconds:.0f} s")
    for line in _findings(done.results):
        emit(line)
    emit(_undo(done))
    emit(f"next: {shlex.join(['moesaic', 'eval', str(done.output), '--baseline', model])}")


def _push(out: Path, repository: str, quiet: bool) -> None:
    """Send what was written; it stays complete where that fails."""
    from moesaic.jobs.push import push

    try:
        address = push(out, repository, progress=ConsoleProgress(quiet))
    except MoesaicError as error:
        again = shlex.join(["moesaic", "push", str(out), repository])
        raise type(error)(f"{out} is complete, but was not sent: {error.message}", f"then: {again}") from error
    if not quiet:
        say(address)


def _undo(done: Conversion) -> str:
    """Whether the dense model can be had back from the output, and how."""
    from moesaic.jobs.undo import why_not
    from moesaic.targets import OWN

    if done.target != OWN:
        return "undo: not from a stock architecture; keep the dense model"
    if reason := why_not(done.blueprint):
        return f"undo: not possible, {reason}; keep the dense model"
    return f"undo: {shlex.join(['moesaic', 'undo', str(done.output), 'DENSE'])} gives the dense model back bit for bit"


def _findings(results: dict[str, Any]) -> Iterator[str]:
    if allocation := results.get("allocation"):
        yield (
            f"allocation {allocation['mode']}: {len(allocation['dense_layers'])} layers stay dense, "
            f"{allocation['active']:.1%} active in all; loss expected of the layers {allocation['expected']:.3f} nats, "
            f"with equal layers {allocation['uniform']:.3f}"
        )
    if fit := results.get("router_fit"):
        mean = fit["mean"]
        yield (
            f"linear routers: {mean['agreement_oracle']:.1%} of the oracle's experts chosen (chance "
            f"{mean['energy_random']:.1%}), energy kept {mean['energy']:.1%}, "
            f"by the method's own {mean['energy_original']:.1%}"
        )
    if parity := results.get("parity"):
        yield from parity_lines(parity, whole=parity.get("layers") is None)
    if native := results.get("native_parity"):
        yield native_line(native)
    if reason := results.get("native_parity_skipped"):
        yield f"not compared with stock transformers: {reason}"

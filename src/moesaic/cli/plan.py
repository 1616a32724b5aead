"""``moesaic plan MODEL``: what a conversion would make, without reading a weight."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, rough

if TYPE_CHECKING:
    from moesaic.jobs.plan import PlanReport


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="plan")(run)


def run(
    model: opt.Model,
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
    as_json: opt.AsJson = False,
) -> None:
    """Show what a conversion would make and take, before it runs."""
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
        whole=whole,
        device=device,
        memory=memory,
    )
    from moesaic.jobs.plan import plan

    report = plan(model, settings)
    if as_json:
        emit_json(report.to_dict())
        return
    kind = "gated" if report.gated else "ungated"
    ffn = f"{kind} FFN of {report.d_ff} neurons, width {report.d_model}"
    emit(f"model       {report.model_type}: {report.layers} layers, {ffn}")
    emit(f"method      {report.method}" + (f" {report.layout}" if report.layout else ""))
    if settings.chosen:
        emit(f"chosen      {settings.chosen}")
    if report.experts:
        emit(f"each FFN    {_experts(report)}")
    layers = f"{report.converted_layers} of {report.layers} layers"
    emit(f"active      {report.active_ffn_fraction:.1%} of the FFN in {layers}")
    active = report.active_ffn_parameters / 1e6
    emit(f"parameters  FFN {report.ffn_parameters / 1e6:.1f} M, active {active:.1f} M, {_routers(report)}")
    emit(f"forecast    about {rough(report.seconds)}, peak memory about {report.peak_bytes / 1e9:.1f} GB")
    for remark in report.remarks:
        emit(f"note        {remark}")
    emit(f"next        moesaic convert {shlex.quote(model)} OUT, with the same options")


def _routers(report: PlanReport) -> str:
    """Their size: parameters, or bytes where they are copies of the weights."""
    size = f"{report.router_bytes / 1e6:.1f} MB"
    if report.int8:
        return f"routers are the high half of the int8 weights, {size}"
    if report.router_bits:
        return f"routers {size} in {report.router_bits} bits"
    return f"routers {report.router_parameters / 1e6:.2f} M"


def _experts(report: PlanReport) -> str:
    """What an FFN becomes, in words."""
    if report.experts == report.d_ff and not report.shared_width:
        return f"each of its {report.experts} neurons is an expert; a token uses {report.top_k}"
    width = f"{report.expert_width} neurons" + (" in the mean over tokens" if report.varied_widths else "")
    routed = f"{report.experts} routed experts of {width}; a token uses {report.top_k}"
    return f"a shared expert of {report.shared_width} neurons, and {routed}" if report.shared_width else routed

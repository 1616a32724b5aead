"""ToMoE (arXiv 2501.15316): which neurons each expert is, and where tokens go, learned by self-distillation.

The dense model is frozen and teaches itself. Per FFN, N overlapping binary masks over the neurons and a linear top-1
router are trained with straight-through samples; the masks come from a hypernetwork over the depth
(:mod:`moesaic.methods.tomoe.hypernetwork`). Optionally attention loses rotary pairs for good and value dims per token.
The loss is KL to the dense model + budget + union coverage + load balance. What is kept is masks and routers: no
weight of the model changes, and a chosen expert has weight 1.

Axes: N windows, W tokens of one, H held-out windows.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from moesaic.checkpoint.loading import load_model
from moesaic.errors import UnsupportedModelError
from moesaic.methods.base import ModelContext, ModelPlan
from moesaic.methods.tomoe.config import Config, check_exportable
from moesaic.methods.tomoe.export import export
from moesaic.methods.tomoe.start import begin
from moesaic.methods.tomoe.task import ToMoETask
from moesaic.train.data import TrainData
from moesaic.train.launch import is_sharded, is_worker
from moesaic.train.loop import STATE_NAME, learned, train
from moesaic.train.state import load_into

_EXPORT_WINDOWS = 8  # held-out windows that set caps and give loads


def plan_model(context: ModelContext, config: Config) -> ModelPlan:
    """Train masks and routers of a whole model; see :class:`moesaic.methods.base.ModelMethodModule`.

    ``context.folder`` receives train.jsonl and the states; the same call resumes there.

    Raises:
        InputError: too little text, a budget that cannot be met, a start that does not fit, a study that cannot be
            exported.
        UnsupportedModelError: the model is MoE already, or its attention cannot be pruned as asked.
    """
    check_exportable(config)
    if context.anatomy.family.moe is not None:
        raise UnsupportedModelError("ToMoE makes experts of dense FFNs; this model is MoE already")
    train_config = config.train.model_copy(update={"seed": context.seed})
    held_out = train_config.held_out
    config.check_text(len(context.ids_NW))
    config = config.model_copy(update={"train": train_config})
    dtype = train_config.resolved_dtype(context.device)
    task = ToMoETask(config, context.anatomy, load_base(context, dtype), context.dense_layers, context.seed)
    if not is_sharded():  # else each process gets its share when training begins
        task.to(context.device)
    held_out_HW, ids_NW = context.ids_NW[:held_out], context.ids_NW[held_out:]
    # Workers cannot know yet whether the first process throws a state away.
    if config.start != "noise" and (is_worker() or not (context.folder / STATE_NAME).exists()):
        context.progress.note(f"masks and routers start from {config.start}")
        begin(task, context.checkpoint, ids_NW)
    key = {"method": "tomoe", "options": config.model_dump(mode="json"), "dense_layers": list(context.dense_layers)}
    key["model"] = context.checkpoint.fingerprint()
    report = train(
        task,
        TrainData(ids_NW, held_out_HW, train_config.seed),
        train_config,
        context.folder,
        key=key,
        progress=context.progress,
        device=context.device,
    )
    if is_worker():
        return ModelPlan({})
    if is_sharded():  # this process holds a part only
        base = load_base(context, dtype)
        task = ToMoETask(config, context.anatomy, base, context.dense_layers, context.seed)
        load_into(task.trained(), learned(context.folder))
    plan = export(task, held_out_HW[:_EXPORT_WINDOWS] if held_out else ids_NW[:_EXPORT_WINDOWS])
    return ModelPlan(plan.sites, plan.attention, {**plan.report, "training": _plain(asdict(report))})


def load_base(context: ModelContext, dtype: torch.dtype) -> nn.Module:
    """The dense model as transformers loads it, in ``dtype``."""
    return load_model(context.checkpoint.folder, dtype)


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: equal runs make equal outputs."""
    return {name: value for name, value in report.items() if name != "seconds"}

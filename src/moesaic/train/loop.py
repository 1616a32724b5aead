"""The training loop: deterministic, resumable, the same in one process and in several.

Order of the data, learning rate and noise are functions of the step, so that a run that was killed goes on from its
last saved state and ends with the same bits (one process, one number of threads). Processes share the sequences of a
step, and their gradients are averaged: two processes learn what one does with all of them, but for rounding.

Under ``accelerate launch`` or ``torchrun`` the task is wrapped for DDP or FSDP; without, it is one process.

Axes: B sequences, W tokens, H held-out windows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic import durable
from moesaic.errors import CheckpointError, InputError, VerificationError
from moesaic.options.device import CPU
from moesaic.progress import Progress, Silent
from moesaic.train import state
from moesaic.train.config import TrainConfig
from moesaic.train.data import TrainData, derived_seed
from moesaic.train.launch import check_shared
from moesaic.train.parallel import Parallel
from moesaic.train.state import BEST_NAME, STATE_NAME, Standing
from moesaic.train.task import TrainTask

LOG_NAME = "train.jsonl"
_TASK, _OPTIMISER = "task/", "optimiser/"
"""What the names of a state's tensors begin with."""
__all__ = ["BEST_NAME", "LOG_NAME", "STATE_NAME", "TrainReport", "TrainTask", "learned", "read_log", "train"]


@dataclass(frozen=True)
class TrainReport:
    """What a training run did.

    Attributes:
        steps: Optimiser steps done.
        seconds: Time they took, resumed runs added up.
        tokens: Tokens seen, held-out ones not counted.
        best_step: After how many steps the held-out loss was best; the last one without held-out text.
        stopped_early: Whether patience ended it.
        before: Held-out figures before the first step; empty without held-out text.
        after: Those of the best step.
    """

    steps: int
    seconds: float
    tokens: int
    best_step: int
    stopped_early: bool
    before: dict[str, float]
    after: dict[str, float]


def train(
    task: TrainTask,
    data: TrainData,
    config: TrainConfig,
    folder: Path,
    *,
    key: Mapping[str, Any],
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> TrainReport:
    """Train ``task`` and leave it with the weights of the best held-out loss (the last ones without held-out text).

    Args:
        task: What is trained.
        data: Its windows.
        config: Steps, batch, optimiser.
        folder: For train.jsonl (a line per logged step) and the states; created if missing. A state of the same key
            that lies there is taken up.
        key: What the result depends on beyond ``config`` and ``data``; JSON-able.
        progress: Receives steps done, and losses as notes.
        device: Of this process, to which the task goes; None is the CPU. Its kind is part of what the result depends
            on.

    Raises:
        InputError: accelerate is missing, the batch cannot be shared among the processes, or ``folder`` holds a run of
            another key.
        CheckpointError: the saved state is damaged.
        VerificationError: the loss is not finite.
        ResourceError: disk full.
    """
    with torch.random.fork_rng(devices=[]):
        return _Run(task, data, config, folder, key, progress or Silent(), device or torch.device(CPU)).run()


class _Entry(nn.Module):
    """One forward for training and evaluation, as wrappers of distributed training see only that."""

    def __init__(self, task: TrainTask, dtype: torch.dtype) -> None:
        super().__init__()
        self.task = task
        self._dtype = dtype

    def forward(self, ids_BW: Tensor, index_B: Tensor, step: int | None) -> Any:
        with torch.autocast(ids_BW.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.task.held_out(ids_BW, index_B) if step is None else self.task(ids_BW, index_B, step)


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        task: TrainTask,
        data: TrainData,
        config: TrainConfig,
        folder: Path,
        key: Mapping[str, Any],
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.task, self.data, self.config, self.progress = task, data, config, progress
        self.folder = folder
        check_shared(config.batch, config.accumulate)
        dtype = config.resolved_dtype(device)
        about = {"caller": dict(key), "config": config.identity(), "data": data.fingerprint(), "dtype": str(dtype)}
        about |= {} if device.type == CPU else {"device": device.type}
        self.key: dict[str, Any] = json.loads(json.dumps(about))
        task.train()
        self.parallel = Parallel(_Entry(task, dtype), task.blocks(), self._make_optimiser, device)
        self.optimiser = self.parallel.optimiser
        self.peak_rates = [group["lr"] for group in self.optimiser.param_groups]
        self.micro = config.batch // (self.parallel.count * config.accumulate)
        self.standing = Standing()

    def _make_optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        groups = [{"lr": config.learning_rate, **group} for group in self.task.parameter_groups()]
        return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)

    def run(self) -> TrainReport:
        self.folder.mkdir(exist_ok=True)  # without parents: see durable.replace_folder
        self._resume()
        self.parallel.accelerator.wait_for_everyone()
        started = time.monotonic() - self.standing.seconds
        if self.standing.step == 0 and self.standing.best_loss is None:
            if len(self.data.held_out_HW):
                self.progress.note(f"held-out text before the training: {len(self.data.held_out_HW)} windows")
            self._log({"step": 0, **self._evaluate_if_due()})
        self.progress.start("training", max(0, self.config.steps - self.standing.step))
        while not self.standing.finished:
            step = self.standing.step
            line = {"step": step + 1, **self._step(step)}
            self.standing.step = step + 1
            line |= self._evaluate_if_due()
            self.standing.seconds = time.monotonic() - started
            self.standing.finished = self._is_last()
            if "held_out" in line or self.standing.step % self.config.log_every == 0 or self.standing.finished:
                self._log({**line, "seconds": round(self.standing.seconds, 3)})
            if self.standing.step % self.config.save_every == 0 or self.standing.finished:
                self._save()
            self.progress.advance(f"loss {line['loss']:.4f}")
        return self._finish()

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; its loss, learning rate and figures."""
        config, parallel = self.config, self.parallel
        factor = _rate_factor(config, step)
        for group, peak in zip(self.optimiser.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        ids_BW, index_B = self.data.batch(step, config.batch)
        totals: dict[str, Tensor] = {}
        for part in range(config.accumulate):
            start = (parallel.rank * config.accumulate + part) * self.micro
            own = slice(start, start + self.micro)
            last = part == config.accumulate - 1
            torch.manual_seed(derived_seed(config.seed, step, start))
            with parallel.part(last):
                loss, figures = parallel.module(parallel.here(ids_BW[own]), parallel.here(index_B[own]), step)
                parallel.backward(loss / config.accumulate, last)
            for name, value in {"loss": loss, **figures}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / config.accumulate
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(parallel.module.parameters(), config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.task.end_step(step, parallel.mean)
        found = {name: float(parallel.mean(value)) for name, value in totals.items()}
        if not math.isfinite(found["loss"]):
            raise VerificationError(
                f"the training loss is {found['loss']} at step {step + 1}",
                "lower the learning rate, or use precision fp32",
            )
        return {"loss": found.pop("loss"), "learning_rate": config.learning_rate * factor, **found}

    def _evaluate_if_due(self) -> dict[str, Any]:
        """Held-out figures when their time has come, and what follows from them."""
        config, standing = self.config, self.standing
        due = standing.step % config.eval_every == 0 or standing.step == config.steps
        if not due or not len(self.data.held_out_HW):
            return {}
        found = self._evaluate()
        if standing.best_loss is None or found["loss"] < standing.best_loss:
            standing.best_loss, standing.best_step, standing.worse = found["loss"], standing.step, 0
            tensors = state.gather(self._trained())
            if self.parallel.main:
                state.write(self.folder / BEST_NAME, tensors, self.key, standing)
        else:
            standing.worse += 1
        self.progress.note(f"step {standing.step}: held-out loss {found['loss']:.4f}, best {standing.best_loss:.4f}")
        return {"held_out": found}

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the held-out windows, shared among the processes."""
        ids_HW, size = self.data.held_out_HW, self.micro
        parts: list[tuple[slice, int]] = [
            (slice(start, start + size), len(ids_HW[start : start + size])) for start in range(0, len(ids_HW), size)
        ]
        parallel, count = self.parallel, self.parallel.count
        while len(parts) % count:  # processes go in step: the rest repeats a part, unweighed
            parts.append((parts[0][0], 0))
        totals: dict[str, Tensor] = {}
        parallel.module.eval()
        for rows, weight in parts[parallel.rank :: count]:
            index_B = torch.arange(len(ids_HW))[rows]
            figures: dict[str, Tensor] = parallel.module(parallel.here(ids_HW[rows]), parallel.here(index_B), None)
            for name, value in figures.items():
                totals[name] = totals.get(name, 0) + value.float() * (weight * count / len(ids_HW))
        parallel.module.train()
        return {name: float(parallel.mean(value)) for name, value in totals.items()}

    def _is_last(self) -> bool:
        patience = self.config.patience
        return self.standing.step == self.config.steps or (patience is not None and self.standing.worse >= patience)

    def _trained(self) -> dict[str, Tensor]:
        self.parallel.settle()
        return self.task.trained()

    def _names(self) -> dict[Tensor, str]:
        self.parallel.settle()
        return {parameter: name for name, parameter in self.task.named_parameters() if parameter.requires_grad}

    def _save(self) -> None:
        tensors = {f"{_TASK}{name}": tensor for name, tensor in state.gather(self._trained()).items()}
        moments = state.gather(state.optimiser_tensors(self.optimiser, self._names()))
        tensors |= {f"{_OPTIMISER}{name}": tensor for name, tensor in moments.items()}
        if self.parallel.main:
            state.write(self.folder / STATE_NAME, tensors, self.key, self.standing)

    def _resume(self) -> None:
        found = state.read(self.folder / STATE_NAME)
        if found is not None:
            tensors, key, self.standing = found
            _compare_keys(self.folder, key, self.key)
            state.load_into(self._trained(), _under(_TASK, tensors))
            state.load_optimiser(self.optimiser, self._names(), _under(_OPTIMISER, tensors))
            if not self.standing.finished:
                self.progress.note(f"training goes on after step {self.standing.step}")
        if self.parallel.main:
            if found is None:  # what lies there is of no run that can be taken up
                (self.folder / BEST_NAME).unlink(missing_ok=True)
            kept = [line for line in read_log(self.folder) if found is not None and line["step"] <= self.standing.step]
            text = "".join(f"{json.dumps(line)}\n" for line in kept)
            durable.replace_text(self.folder / LOG_NAME, text)

    def _finish(self) -> TrainReport:
        standing = self.standing
        self.parallel.finish()
        state.load_into(self._trained(), learned(self.folder))
        self.task.eval().zero_grad()
        held_out = {line["step"]: line["held_out"] for line in read_log(self.folder) if "held_out" in line}
        return TrainReport(
            steps=standing.step,
            seconds=standing.seconds,
            tokens=standing.step * self.config.batch * self.data.window,
            best_step=standing.step if standing.best_loss is None else standing.best_step,
            stopped_early=standing.step < self.config.steps,
            before=held_out.get(0, {}),
            after=held_out.get(standing.best_step, {}),
        )

    def _log(self, line: Mapping[str, Any]) -> None:
        if self.parallel.main and len(line) > 1:
            durable.append_line(self.folder / LOG_NAME, json.dumps(line))


def learned(folder: Path) -> dict[str, Tensor]:
    """What a finished run in ``folder`` leaves, named as ``task.trained()``: the weights of the best held-out loss, the
    last ones without held-out text. Raises CheckpointError when there are none or the file is damaged."""
    best = state.read(folder / BEST_NAME)
    if best is not None:
        return best[0]
    last = state.read(folder / STATE_NAME)
    if last is None:
        raise CheckpointError(f"no training state in {folder}", "start the training again with --restart")
    return _under(_TASK, last[0])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's train.jsonl, in order of steps; a torn last line is left out."""
    return list(_lines(folder / LOG_NAME))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return


def _rate_factor(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, in peaks."""
    warmup = min(config.warmup, config.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (config.steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]


def _compare_keys(folder: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    flat = [{**key, **key["config"]} for key in (kept, wanted)]
    different = [name for name in sorted(flat[0].keys() | flat[1].keys()) if flat[0].get(name) != flat[1].get(name)]
    if different:
        names = ", ".join(name for name in different if name != "config")
        raise InputError(
            f"{folder} holds another training run (differs in {names})", "use --restart, or another output"
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

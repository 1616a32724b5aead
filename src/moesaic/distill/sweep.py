"""Many trainings side by side, each kept as it ends, so that a sweep that was stopped goes on."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic import durable
from moesaic.distill.config import DistillConfig, Trial
from moesaic.distill.data import SPLITS, Pairs, read_pairs
from moesaic.distill.fit import Fit, fit, train_student
from moesaic.distill.probe import TopKAutoencoder
from moesaic.errors import ResourceError
from moesaic.options.device import CPU
from moesaic.progress import Progress


def run_trial(trial: Trial, data: Path, config: DistillConfig, device: torch.device) -> Fit:
    """Train one student, or one dictionary, on the data in a folder."""
    train, validation, test = (read_pairs(data, trial.law, split) for split in SPLITS)
    common: dict[str, Any] = {"rate": trial.rate, "epochs": config.epochs, "batch": config.batch}
    common |= {"seed": config.seed, "device": device}
    if trial.spec is not None:
        return fit(trial.spec, train, validation, test, **common)
    splits = [Pairs(pairs.x_TD, pairs.x_TD) for pairs in (train, validation, test)]
    model = TopKAutoencoder(train.x_TD, trial.atoms, trial.top_k, config.seed)
    return train_student(model, *splits, **common)


def sweep(
    trials: Sequence[Trial],
    data: Path,
    folder: Path,
    config: DistillConfig,
    processes: int,
    progress: Progress,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Run all trials that ``folder`` does not hold yet.

    Args:
        trials: What to run.
        data: Folder of the activations.
        folder: Where a file per trial is kept; created if missing.
        config: Of the sweep.
        processes: How many run at a time; the processor's threads are shared among them.
        progress: Receives a step per trial.
        device: Where students are trained; None is the CPU.

    Returns:
        Of every trial, in order, its fields and its fit.

    Raises:
        ResourceError: a process died (usually of memory), or the disk is full.
    """
    folder.mkdir(exist_ok=True)  # without parents: see durable.replace_folder
    work = partial(run_trial, data=data, config=config, device=device or torch.device(CPU))
    missing = [trial for trial in trials if not (folder / f"{trial.name()}.json").exists()]
    progress.start("training students", len(missing))

    def keep(trial: Trial, made: Fit) -> None:
        text = json.dumps({**trial.to_dict(), **made.to_dict()})
        durable.replace_text(folder / f"{trial.name()}.json", text + "\n")
        progress.advance(_about(trial, made))

    if processes == 1:
        for trial in missing:
            keep(trial, work(trial))
    elif missing:
        _run_parallel(missing, work, processes, keep)
    return [json.loads((folder / f"{trial.name()}.json").read_text(encoding="utf-8")) for trial in trials]


def _run_parallel(trials: Sequence[Trial], work: Callable[[Trial], Fit], processes: int, keep: Any) -> None:
    threads = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )
    try:
        waiting: dict[Future[Fit], Trial] = {pool.submit(work, trial): trial for trial in trials}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                keep(waiting.pop(future), future.result())
    except BrokenProcessPool as error:
        raise ResourceError(
            "a training process died, probably for want of memory", "run it again with fewer --processes: it resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _about(trial: Trial, made: Fit) -> str:
    what = f"dictionary k={trial.top_k}" if trial.spec is None else f"{trial.spec.family} {trial.spec.split}"
    return f"{trial.law} {what} rate {trial.rate:g}: {'diverged' if made.fvu is None else f'FVU {made.fvu:.4f}'}"

"""Writing an output folder so that a crash at any moment leaves it absent or complete, and the same command resumes.

Everything happens in ``OUT.partial`` beside OUT, on the same file system:

    .moesaic.lock   held by the process that writes
    key.json        what the output depends on; another key is not resumed
    progress.jsonl  one line per step's decisions and one per finished shard, written when that is on disk: step,
                    sha256 (null without a shard), bytes, plans, tensors
    shards/         finished shards, by step
    plans/          the decisions that belong to them, by step
    state.safetensors  what calibration needs to go on at the next layer, and the steps that it stands on
    work/           scratch files of the running process
    model/          the output itself; the last act is to rename it to OUT

What has no line, or is not what its line says, is done again; so is what a torn last line stands for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic import durable
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError, ResourceError, UnfinishedCheckError, VerificationError
from moesaic.staging.key import compare_keys, read_key
from moesaic.staging.manifest import MANIFEST_NAME, build_manifest, hash_file
from moesaic.staging.placement import absolute, check_output, check_space, partial_of
from moesaic.staging.results import RESULTS_NAME

log = logging.getLogger(__name__)

LOCK_NAME = ".moesaic.lock"

INDEX_NAME = "model.safetensors.index.json"
_LINE_KEYS = {"step", "sha256", "bytes", "plans", "tensors"}
_STEP = re.compile(r"[A-Za-z0-9._-]+")


class StagedOutput:
    """One output folder in the making; made by :meth:`open`."""

    def __init__(self, out: Path, key: Mapping[str, Any]) -> None:
        self.out = out
        self.root = partial_of(out)
        self.folder = self.root / "model"
        self.work = self.root / "work"  # emptied at the start
        self.training = self.root / "training"  # kept until OUT appears
        self._key = dict(key)
        self._log = self.root / "progress.jsonl"
        self._state = self.root / "state.safetensors"
        self._finished: dict[str, dict[str, Any]] = {}
        self._rejected = False
        self.resumed = False
        """Whether an interrupted run has done a part of the work."""

    @staticmethod
    def check(out: str | Path, source: str | Path | None = None) -> None:
        """Refuse, before any work, an output that cannot be. Raises InputError; writes nothing."""
        check_output(absolute(out), None if source is None else absolute(source))

    @classmethod
    @contextmanager
    def open(
        cls,
        out: str | Path,
        key: Mapping[str, Any],
        *,
        source: str | Path | None = None,
        expected_bytes: int = 0,
        restart: bool = False,
    ) -> Iterator[StagedOutput]:
        """Lock and open ``OUT.partial``, taking up what an interrupted run left there.

        When the block ends without :meth:`finish`, what was written stays for the next run; an empty folder does not.

        Args:
            out: The folder to create.
            key: What the output depends on, JSON-able. Results of another key are not mixed.
            source: The model that is read; neither may lie inside the other.
            expected_bytes: Size of the output, about; refused when the disk has less.
            restart: Throw away what an interrupted run left.

        Raises:
            InputError: OUT exists, lies inside the model, cannot be created, is being written by another process, or
                ``OUT.partial`` belongs to another conversion.
            ResourceError: not enough disk.
        """
        cls.check(out, source)
        staged = cls(absolute(out), json.loads(json.dumps(key)))
        with staged._locked():
            cls.check(out, source)  # again: another process may have finished it in between
            staged._prepare(restart)
            try:
                check_space(staged.out.parent, expected_bytes - staged._staged_bytes())
                with durable.full_disk_errors(staged.root):
                    yield staged
            finally:
                staged._leave()

    def planned(self, step: str) -> bool:
        """Whether this step's decisions are kept."""
        return step in self._finished and self._plans_of(step).is_dir()

    def done(self, step: str) -> bool:
        """Whether this step's shard is written."""
        return step in self._shards

    def write_plans(
        self,
        step: str,
        plans: Mapping[str, LayerPlan],
        reports: Mapping[str, Any] | None = None,
        attention: Mapping[str, AttentionPlan] | None = None,
    ) -> None:
        """Keep the decisions of a step, and what there is to say of them (JSON-able), for :meth:`read_plans`.

        They are on disk when this returns. Call before the step's :meth:`write_shard`.
        """
        part = Blueprint("", "", "", dict(reports or {}), dict(plans), dict(attention or {}))
        durable.replace_folder(self._plans_of(step), part.save)
        self._note({"step": step, "sha256": None, "bytes": 0, "plans": self._plans_digest(step), "tensors": {}})

    def read_plans(self, step: str) -> tuple[dict[str, LayerPlan], dict[str, Any], dict[str, AttentionPlan]]:
        """Decisions on FFNs, reports, decisions on attention that :meth:`write_plans` kept for a planned step."""
        kept = Blueprint.load(self._plans_of(step))
        return kept.sites, kept.config, kept.attention

    def write_shard(self, step: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard and note it as done; it is on disk when this returns.

        Raises ResourceError when it cannot be written.
        """
        path = self._shard_of(step)
        durable.replace_tensors(path, tensors)
        line = {
            "step": step,
            "sha256": hash_file(path),
            "bytes": path.stat().st_size,
            "plans": self._plans_digest(step),
            "tensors": {name: [tensor.nbytes, tensor.numel()] for name, tensor in tensors.items()},
        }
        self._note(line)

    def write_state(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the resume state: all that is needed to go on at ``layer``, given the steps that are done by now."""
        stamp = json.dumps({"layer": layer, "steps": sorted(self._finished)})
        durable.replace_tensors(self._state, tensors, {"stamp": stamp})

    def read_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last :meth:`write_state`; None when there is none or a step that it stands on must be done again."""
        if not self._state.exists():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                stamp = json.loads(file.metadata()["stamp"])
                if not self._finished.keys() >= set(stamp["steps"]):
                    return None
                return stamp["layer"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, TypeError):
            log.warning("%s is damaged: calibration starts at the first layer again", self._state)
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the output (UTF-8)."""
        path = self._file(name)
        with durable.disk_errors(path):
            path.write_bytes(text.encode())

    def copy_file(self, path: Path, name: str | None = None) -> None:
        """Copy a file into the output, byte for byte, under its own name or ``name``; links are followed."""
        target = self._file(name or path.name)
        with durable.disk_errors(target):
            shutil.copyfile(path, target)

    def finish(
        self,
        *,
        results: Mapping[str, Any] | None = None,
        verify: Callable[[Path], object] | None = None,
        manifest: bool = True,
    ) -> Path:
        """Name the shards, write index and manifest, verify, and let OUT appear. Returns OUT.

        Args:
            manifest: Whether the output gets a manifest.json.
            results: For results.json, read after ``verify`` so that it can add to it; no such file when None.
            verify: Called with the complete staged folder; when it raises, OUT does not appear. What has failed a check
                would fail it again, so nothing of it stays then, unless the check came to no end.
        """
        names = self._place_shards()
        self._write_index(names)
        if manifest:
            known = {names[step]: line["sha256"] for step, line in self._shards.items()}
            content = build_manifest(self.folder, self._key, known)
            self.write_text(MANIFEST_NAME, json.dumps(content, indent=1, sort_keys=True) + "\n")
        if verify is not None:
            self._verified(verify)
        if results is not None:
            self.write_text(RESULTS_NAME, json.dumps(results, indent=1) + "\n")
        with durable.disk_errors(self.out):
            durable.sync_tree(self.folder)
            self.folder.rename(self.out)
            durable.sync(self.root)
            durable.sync(self.out.parent)
        return self.out

    def _verified(self, verify: Callable[[Path], object]) -> None:
        try:
            verify(self.folder)
        except UnfinishedCheckError:
            raise
        except VerificationError:
            self._rejected = True
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            if self.root.is_symlink() or (self.root.exists() and not self._is_ours()):
                raise InputError(f"{self.root} is in the way and no unfinished output of moesaic", "move it elsewhere")
            with durable.full_disk_errors(self.root):
                self.root.mkdir(exist_ok=True)
                lock = FileLock(self.root / LOCK_NAME, timeout=0)
                lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is writing {self.out}", "wait for it or choose another output"
            ) from error
        except ResourceError:
            with contextlib.suppress(OSError):
                self.root.rmdir()  # refused where another process has its lock in it
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot create {self.root}: {getattr(error, 'strerror', None) or error}", "may this user write there?"
            ) from error
        try:
            yield
        finally:
            if [path.name for path in self.root.glob("*")] == [LOCK_NAME]:
                shutil.rmtree(self.root, ignore_errors=True)
            lock.release()

    def _is_ours(self) -> bool:
        return self.root.is_dir() and ((self.root / LOCK_NAME).exists() or not any(self.root.iterdir()))

    def _prepare(self, restart: bool) -> None:
        """Bring the staging folder into the state from which work goes on."""
        key_path = self.root / "key.json"
        with durable.disk_errors(self.root):
            # Without model/, the last act of an earlier run is done and only its remains are left.
            if restart or not key_path.exists() or not self.folder.exists():
                key_path.unlink(missing_ok=True)  # first: without it, nothing of the rest is believed
                durable.sync(self.root)
                durable.empty(self.root, keep=LOCK_NAME)
            else:
                compare_keys(self.root, read_key(key_path), self._key)
                self._recall_shards()
            for name in ("model", "work", "shards", "plans", "training"):
                (self.root / name).mkdir(exist_ok=True)
            durable.empty(self.folder)
            durable.empty(self.work)
        if not key_path.exists():
            durable.replace_text(key_path, json.dumps(self._key, indent=1, sort_keys=True) + "\n")
        self._read_progress()

    def _read_progress(self) -> None:
        """Take up the shards that are as the log says; rewrite the log without the others."""
        text = self._log.read_bytes() if self._log.exists() else b""
        lines = [_parse(line) for line in text.split(b"\n")]
        good = [line for line in lines if line is not None and self._intact(line)]
        self._finished = {line["step"]: line for line in good}
        self.resumed = bool(good) or any(self.training.iterdir())
        kept = "".join(f"{json.dumps(line)}\n" for line in good)
        if kept.encode() != text or not self._log.exists():
            durable.replace_text(self._log, kept)

    @property
    def _shards(self) -> dict[str, dict[str, Any]]:
        """The lines of the steps whose shards are written."""
        return {step: line for step, line in self._finished.items() if line["sha256"] is not None}

    def _note(self, line: dict[str, Any]) -> None:
        durable.append_line(self._log, json.dumps(line))
        self._finished[line["step"]] = line

    def _intact(self, line: Mapping[str, Any]) -> bool:
        path = self._shard_of(line["step"])
        if line["sha256"] is None:
            return self._plans_digest(line["step"]) == line["plans"]
        intact = path.exists() and path.stat().st_size == line["bytes"] and hash_file(path) == line["sha256"]
        intact = intact and self._plans_digest(line["step"]) == line["plans"]
        if not intact:
            log.warning("%s is missing or damaged and is written again", path)
        return intact

    def _place_shards(self) -> dict[str, str]:
        """Move the shards to their final names, in the order of their steps' names; returns name by step.

        The names are noted first, so that :meth:`_recall_shards` can take back an interrupted move.
        """
        steps = sorted(self._shards)
        total = len(steps)
        names = {step: f"model-{i:05d}-of-{total:05d}.safetensors" for i, step in enumerate(steps, 1)}
        if total == 1:
            names = {steps[0]: "model.safetensors"}
        durable.replace_text(self.root / "names.json", json.dumps(names))
        with durable.disk_errors(self.folder):
            for step, name in names.items():
                self._shard_of(step).rename(self.folder / name)
            durable.sync(self.folder)
            durable.sync(self.root / "shards")
        return names

    def _recall_shards(self) -> None:
        names_path = self.root / "names.json"
        if not names_path.exists():
            return
        for step, name in json.loads(names_path.read_text(encoding="utf-8")).items():
            if (self.folder / name).exists():
                (self.folder / name).rename(self._shard_of(step))
        durable.sync(self.root / "shards")
        durable.sync(self.folder)
        names_path.unlink()

    def _write_index(self, names: Mapping[str, str]) -> None:
        weight_map: dict[str, str] = {}
        size, parameters = 0, 0
        for step, line in self._shards.items():
            for name, (nbytes, numel) in line["tensors"].items():
                if name in weight_map:
                    raise VerificationError(f"tensor {name} was written twice, in {weight_map[name]} and {names[step]}")
                weight_map[name] = names[step]
                size, parameters = size + nbytes, parameters + numel
        if len(names) > 1:
            index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
            self.write_text(INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _leave(self) -> None:
        """Remove the staging folder when OUT has appeared, was found wrong, or nothing is worth keeping."""
        if self.folder.exists() and not self._rejected and (self._finished or any(self.training.iterdir())):
            durable.empty(self.work)
        else:
            shutil.rmtree(self.root, ignore_errors=True)

    def _staged_bytes(self) -> int:
        return sum(line["bytes"] for line in self._finished.values())

    def _shard_of(self, step: str) -> Path:
        return self.root / "shards" / f"{_checked(step)}.safetensors"

    def _plans_of(self, step: str) -> Path:
        return self.root / "plans" / _checked(step)

    def _plans_digest(self, step: str) -> str | None:
        folder = self._plans_of(step)
        return ",".join(hash_file(path) for path in sorted(folder.iterdir())) if folder.is_dir() else None

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder):
            raise InputError(f"file name {name!r} leads outside the output folder")
        with durable.disk_errors(path):  # not with parents=True: a staging folder that has vanished stays away
            for parent in reversed(Path(name).parents[:-1]):
                (self.folder / parent).mkdir(exist_ok=True)
        return path


def _checked(step: str) -> str:
    if not _STEP.fullmatch(step):
        raise ValueError(f"step {step!r} cannot be a file name")
    return step


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line of the log; None when it is torn or damaged."""
    try:
        entry = json.loads(line)
        return entry if entry.keys() >= _LINE_KEYS else None
    except (ValueError, RecursionError, AttributeError):
        return None

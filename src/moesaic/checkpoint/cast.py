"""A copy of a checkpoint in another dtype."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from moesaic.checkpoint.reader import CONFIG, WEIGHTS, Checkpoint
from moesaic.durable import disk_errors


def cast_copy(folder: Path, output: Path, dtype: str) -> Path:
    """Write the model in ``folder`` to ``output`` with every floating-point weight in ``dtype``; returns ``output``.

    An ``output`` that is there already is complete, and is returned as it is.

    Args:
        folder: A checkpoint whose weights fit into memory.
        output: Folder to create.
        dtype: torch's name, such as ``bfloat16``.

    Raises:
        CheckpointError: a tensor is not finite, or a file is damaged.
        ResourceError: no room.
    """
    import torch
    from safetensors.torch import save_file

    if output.is_dir():
        return output
    source, wanted = Checkpoint(folder), getattr(torch, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".cast-", dir=output.parent))
    try:
        with disk_errors(output):
            tensors = {name: source.finite_tensor(name) for name in source.names}
            cast = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
            save_file(cast, staging / WEIGHTS, metadata={"format": "pt"})
            config = {**source.config, "dtype": dtype, "torch_dtype": dtype}
            (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for path in (*source.side_files(), *source.folder.glob("README.md")):
                copy = staging / path.relative_to(source.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        return staging.replace(output)
    except OSError:
        if output.is_dir():  # another process was faster
            return output
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)

"""Which device computes: a name that an option gives, and what of it is there. No torch until it is asked for.

The layer at work, its inputs and the solvers are there; token windows, hidden states and decisions are in host memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from moesaic.errors import InputError, ResourceError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
CPU = "cpu"


def _cuda() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _xpu() -> int:
    import torch

    return torch.xpu.device_count() if torch.xpu.is_available() else 0


def _mps() -> int:
    import torch

    return int(torch.backends.mps.is_available())


KINDS: dict[str, Callable[[], int]] = {"cuda": _cuda, "xpu": _xpu, "mps": _mps}
"""Kinds of devices besides the CPU, in the order in which ``auto`` looks for them, and how many of them are there."""


def _checked(name: str) -> str:
    kinds = "|".join(KINDS)
    if re.fullmatch(rf"{AUTO}|{CPU}|({kinds})(:\d+)?", name) is None:
        raise InputError(f"unknown device {name!r}", f"known: {AUTO}, {CPU}, {', '.join(KINDS)}, or e.g. cuda:1")
    return name


DeviceName = Annotated[str, AfterValidator(_checked)]
"""``auto``, ``cpu``, or a kind of ``KINDS``, perhaps with a number: ``cuda:1``."""

MEANING = (
    "Where layers and solvers compute: auto, cpu, cuda, cuda:1, xpu or mps. auto takes a GPU where there is one. "
    "Token windows and hidden states stay in host memory."
)


def find_device(name: str) -> torch.device:
    """The device that a name means on this machine.

    Of several processes that a launcher started, each takes its own where no number is given.

    Raises:
        InputError: The name is unknown, or the device is not there.
    """
    import torch

    kind, _, number = _checked(name).partition(":")
    if kind == AUTO:
        kind = next((each for each, count in KINDS.items() if count()), CPU)
    if kind == CPU:
        return torch.device(CPU)
    there = KINDS[kind]()
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= there:
        have = ", ".join([CPU, *(f"{each}:{i}" for each, count in KINDS.items() for i in range(count()))])
        raise InputError(f"device {name} is not there", f"this machine has {have}")
    return torch.device(kind, index)


def exact_device(device: torch.device) -> torch.device:
    """Where solvers compute for layers on ``device``: they need float64, which Apple's GPUs do not have."""
    import torch

    return torch.device(CPU) if device.type == "mps" else device


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (of CPUs: AVX512-BF16, AMX, Arm's), so that they are
    faster than fp32."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != CPU:
        return device.type == "xpu"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that we allow
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def native_bfloat16_by_name(name: str) -> bool:
    """:func:`native_bfloat16` as far as it shows without torch: of the CPU by the system's list of its features."""
    if name.partition(":")[0] not in (AUTO, CPU):
        return not name.startswith("mps")
    return not cpu_features().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def cpu_features() -> frozenset[str]:
    """The CPU's features as the system lists them; none where it does not. No torch here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, ()))


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a device's own memory; None for the CPU, and where the device shares the host's."""
    kind = _module(device)
    if not hasattr(kind, "mem_get_info"):
        return None
    free, total = kind.mem_get_info(device)
    return int(free), int(total)


def device_for(name: str, nbytes: float, what: str) -> torch.device:
    """The device that a name means, for something that must lie on it as a whole.

    ``auto`` takes the CPU where the GPU has no room.

    Args:
        name: As :func:`find_device` takes it.
        nbytes: Bytes that are needed at once.
        what: For the message, e.g. "the model".

    Raises:
        InputError: as :func:`find_device`.
        ResourceError: the device was named, and has too little free memory.
    """
    import torch

    device = find_device(name)
    memory = device_memory(device)
    if memory is None or nbytes <= memory[0]:
        return device
    if name == AUTO:
        return torch.device(CPU)
    raise ResourceError(
        f"{what} needs {nbytes / 1e9:.1f} GB, {device} has {memory[0] / 1e9:.1f} GB free",
        "use --device cpu, or a device with more memory",
    )


def device_of(model: object) -> torch.device:
    """Where a transformers model is; of what does not say it, the CPU."""
    import torch

    return getattr(model, "device", torch.device(CPU))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked for: before a clock is read."""
    kind = _module(device)
    if hasattr(kind, "synchronize"):
        kind.synchronize()


def describe(device: torch.device) -> str:
    """The device in words: its name, and how much of its memory is free."""
    kind = _module(device)
    name = kind.get_device_name(device) if hasattr(kind, "get_device_name") else ""
    memory = device_memory(device)
    room = "" if memory is None else f", {memory[0] / 1e9:.1f} of {memory[1] / 1e9:.1f} GB free"
    return f"{device}{f' ({name})' if name else ''}{room}"


def _module(device: torch.device) -> Any:
    """What torch offers for a kind of device, such as ``torch.cuda``; None for the CPU, which has none of it."""
    import torch

    return None if device.type == CPU else getattr(torch, device.type, None)

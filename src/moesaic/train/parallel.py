"""One process or several: which wrapper a task gets, and what differs between them.

accelerate finds the processes, and their devices where there are several, and wraps for DDP. FSDP
(``accelerate launch --use_fsdp``) is torch's ``fully_shard`` called here, as accelerate leaves it out on CPUs, where it
would run in DDP without a word.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.options.device import CPU
from moesaic.solvers.team import ALONE, Team
from moesaic.train.launch import is_sharded, processes

if TYPE_CHECKING:
    from accelerate import Accelerator

MakeOptimiser = Callable[[], torch.optim.Optimizer]


class Parallel:
    """A wrapped module and its optimiser.

    Args:
        module: What is called; on return of this it is on the device of its process, under FSDP its share of it.
        blocks: Parts of it to be sharded one by one under FSDP.
        make_optimiser: Called when the parameters are where they stay.
        device: Of this process.
    """

    def __init__(
        self, module: nn.Module, blocks: Iterable[nn.Module], make_optimiser: MakeOptimiser, device: torch.device
    ) -> None:
        atexit.unregister(_leave)
        self.accelerator = _accelerator(device)
        self.count, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.main = self.accelerator.is_main_process
        self.device = device if self.count == 1 else self.accelerator.device
        self._sharded = is_sharded()
        if self._sharded:
            from torch.distributed.fsdp import fully_shard

            for part in blocks:
                fully_shard(part)
            fully_shard(module)
            self.module: nn.Module = module
        elif self.count == 1:
            self.module = module.to(device)
        else:
            self.module = self.accelerator.prepare(module)
        self.optimiser = make_optimiser()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients; processes exchange them with the ``last`` part of a step."""
        if self._sharded:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a step."""
        if last or self._sharded:
            yield
        else:
            with self.accelerator.no_sync(self.module):
                yield

    def settle(self) -> None:
        """Make the module's parameters those that the optimiser has, after forwards that had left them gathered."""
        if self._sharded:
            for part in self.module.modules():
                if hasattr(part, "reshard"):
                    part.reshard()  # type: ignore[operator]

    def finish(self) -> None:
        """Wait for all processes; the group of them ends with this one.

        Left to the interpreter's end, torch 2.13 now and then aborts the process among the group's threads. Not done
        when training fails: ending the group could wait for processes that wait for this one.
        """
        self.accelerator.wait_for_everyone()
        atexit.register(_leave)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value, "mean")  # type: ignore[assignment]
        return reduced

    def here(self, tensor: Tensor) -> Tensor:
        """The tensor on this process's device."""
        return tensor.to(self.device)


def _accelerator(device: torch.device) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise InputError("training needs accelerate", "pip install 'moesaic[tune]'") from error
    # Autocast and accumulation are ours: accelerate keeps its settings of both for the life of the process. Experts
    # that no token chose have no gradient, which DDP must be told to expect.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Asked for the CPU once, it knows no other device for the life of the process.
    on_cpu = processes() > 1 and device.type == CPU
    return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[ddp])


_PATIENCE = timedelta(days=7)
"""How long processes wait for one that works alone: what layers lose is measured by the first, which takes hours."""


def start_team() -> Team:
    """The processes that the launcher started, joined in a group; this one alone where there was none."""
    if processes() == 1:
        return ALONE
    if not _several():
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    return Team(torch.distributed.get_rank(), torch.distributed.get_world_size())


def end_team(team: Team) -> None:
    """Wait for all processes, and end their group; see :meth:`Parallel.finish`."""
    if team.size > 1:
        torch.distributed.barrier()
        _leave()


def mean_over_processes(value: Tensor) -> Tensor:
    """``value`` averaged over the processes, for losses that are not means over tokens.

    The gradient is this process's share: averaged over the processes, as DDP and FSDP do, it is the gradient that one
    process would have with the whole batch.
    """
    if not _several():
        return value
    everywhere = value.detach().clone()
    torch.distributed.all_reduce(everywhere)
    return value + (everywhere / torch.distributed.get_world_size() - value).detach()


def max_over_processes(values_T: Tensor) -> Tensor:
    """The largest of all processes' values; the gradient is shared evenly by those that equal it, see above."""
    if not _several():
        return values_T.max()
    largest = values_T.detach().max()
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    equal_T = (values_T == largest).to(values_T.dtype)
    count = equal_T.sum()
    torch.distributed.all_reduce(count)
    share_T = equal_T * torch.distributed.get_world_size() / count
    return largest + (share_T * (values_T - values_T.detach())).sum()


def _leave() -> None:
    if _several():
        torch.distributed.destroy_process_group()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

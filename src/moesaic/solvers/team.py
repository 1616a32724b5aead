"""Several processes that decide together: each makes its part of the rows of a tensor, and all get all of them.

What is made is the same bytes with any number of processes. So rows are made in blocks that do not depend on it, and
nothing is summed over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """``size`` processes of torch's default group, of which this one is the ``rank``-th."""

    rank: int = 0
    size: int = 1

    def part(self, count: int, block: int = 1) -> slice:
        """This process's run of ``count`` rows: whole blocks, as even as these allow."""
        return self._parts(count, block)[self.rank]

    def rows(self, count: int, block: int, make: Callable[[slice], Tensor]) -> Tensor:
        """All ``count`` rows, of which ``make`` gives a run of whole blocks.

        What ``make`` gives of a block must not depend on the run that it stands in.
        """
        if self.size == 1:
            return make(slice(0, count))
        return self.gather(make(self.part(count, block)), count, block)

    def gather(self, mine: Tensor, count: int, block: int = 1) -> Tensor:
        """All ``count`` rows, of which each process has its :meth:`part`; on the CPU where ``mine`` is."""
        if self.size == 1:
            return mine
        rows = torch.empty((count, *mine.shape[1:]), dtype=mine.dtype)
        parts = self._parts(count, block)
        rows[parts[self.rank]] = mine.cpu()
        for rank, part in enumerate(parts):
            self.spread(rows[part], rank)
        return rows.to(mine.device)

    def spread(self, tensor: Tensor, rank: int) -> None:
        """Make ``tensor``, contiguous and on the CPU, what it is in the process ``rank``."""
        if self.size > 1 and tensor.numel():
            # As bytes: gloo does not know every dtype.
            distributed.broadcast(tensor.view(-1).view(torch.uint8), src=rank)

    def owner(self, number: int) -> int:
        """Who makes the ``number``-th of things that become smaller: 0, 1, 1, 0, 0, 1 of two."""
        turn, place = divmod(number, self.size)
        return place if turn % 2 == 0 else self.size - 1 - place

    def told(self, value: T) -> T:
        """What ``value`` is in the first process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def _parts(self, count: int, block: int) -> list[slice]:
        blocks = -(-count // block)
        ends = [min(count, blocks * rank // self.size * block) for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]


ALONE = Team()

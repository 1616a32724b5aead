"""A stream whose windows are shared out over processes: each computes its own, and all see what FFNs read of all.

Windows are computed one by one, so that what is seen is the same bytes with any number of processes.

Axes: N windows, W tokens per window, T = N W tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moesaic.anatomy.base import Anatomy
from moesaic.calibration.stream import Captured, LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.solvers.team import Team


class TeamStream(LayerStream):
    """:class:`LayerStream` over this process's share of the windows; every method is called by all processes.

    Args:
        checkpoint: The model.
        anatomy: Of the same model.
        ids_NW: Token ids of all windows, int64 [N, W].
        team: The processes; at least a window for each.
        options: Of :class:`LayerStream`.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, ids_NW: Tensor, team: Team, **options: Any) -> None:
        self.team = team
        self.windows = len(ids_NW)
        super().__init__(checkpoint, anatomy, ids_NW[team.part(len(ids_NW))], **options)

    def capture(self) -> Captured:
        """See :meth:`LayerStream.capture`; of all windows."""
        return super().capture().of_all(self.team, self.windows)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`LayerStream.state`; of all windows."""
        return {name: self.team.gather(mine, self.windows) for name, mine in super().state().items()}

    def restore(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """See :meth:`LayerStream.restore`; ``state`` is of all windows."""
        part = self.team.part(self.windows)
        super().restore(layer, {name: tensor[part] for name, tensor in state.items()})

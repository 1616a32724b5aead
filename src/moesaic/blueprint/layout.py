"""The ``SxAyEz`` notation: x shared units, y active routed experts, z units in all (CMoE, section 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesaic.errors import InputError

_PATTERN = re.compile(r"S(\d+)A(\d+)E(\d+)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Layout:
    """How an FFN is split: ``shared`` units always on, ``active`` of ``units - shared`` routed experts on per token."""

    shared: int
    active: int
    units: int

    def __post_init__(self) -> None:
        if self.units < 1 or self.shared < 0 or self.active < 0:
            raise InputError(f"layout {self} has a negative or zero part", "write SxAyEz, e.g. S3A3E8")
        if self.shared > self.units:
            raise InputError(f"layout {self} has more shared units than units", "x in SxAyEz is at most z")
        if self.active > self.routed:
            raise InputError(
                f"layout {self}: top-k {self.active} is larger than its {self.routed} routed experts",
                "SxAyEz has z - x routed experts, so y is at most z - x",
            )
        if self.shared + self.active == 0:
            raise InputError(f"layout {self} leaves nothing active", "x + y in SxAyEz is at least 1")
        if self.routed > 0 and self.active == 0:
            raise InputError(f"layout {self} never uses its routed experts", "y in SxAyEz is at least 1 when x < z")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``"S3A3E8"``. Raises InputError with the notation explained."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"cannot read layout {text!r}", "write SxAyEz, e.g. S3A3E8: 3 shared, 3 of 5 routed, 8 units"
            )
        return cls(*(int(part) for part in match.groups()))

    @classmethod
    def from_active_fraction(cls, fraction: float, units: int = 8) -> Layout:
        """The layout of ``units`` units nearest to an active fraction, half of the active units shared (rounded down).

        0.75 with 8 units is S3A3E8, 0.5 is S2A2E8, 0.25 with 16 units is S2A2E16. Raises InputError when the fraction
        is not in (0, 1].
        """
        if not 0.0 < fraction <= 1.0:
            raise InputError(f"active fraction {fraction} is not in (0, 1]", "use e.g. --active 0.75")
        active_units = max(1, round(fraction * units))
        if active_units == units:
            return cls(units // 2, units - units // 2, units)
        shared = active_units // 2
        return cls(shared, active_units - shared, units)

    @property
    def routed(self) -> int:
        """Number of routed experts."""
        return self.units - self.shared

    @property
    def active_fraction(self) -> float:
        """Fraction of the FFN that one token uses."""
        return (self.shared + self.active) / self.units

    def unit_sizes(self, d_ff: int) -> list[int]:
        """Neurons per unit, largest first; they differ by at most one and sum to ``d_ff``.

        The first ``shared`` entries belong together as the shared expert. Raises InputError when ``d_ff < units``.
        """
        if d_ff < self.units:
            raise InputError(
                f"layout {self} wants {self.units} units but the FFN has only {d_ff} neurons", "use fewer experts"
            )
        size, longer = divmod(d_ff, self.units)
        return [size + 1] * longer + [size] * (self.units - longer)

    def shared_size(self, d_ff: int) -> int:
        """Neurons of the shared expert."""
        return sum(self.unit_sizes(d_ff)[: self.shared])

    def expert_sizes(self, d_ff: int) -> list[int]:
        """Neurons of each routed expert, before padding to the common width ``max(expert_sizes)``."""
        return self.unit_sizes(d_ff)[self.shared :]

    def __str__(self) -> str:
        return f"S{self.shared}A{self.active}E{self.units}"

"""What a conversion takes where no method is named: the form that lost least of those that the target holds.

The figures behind it: ``docs/results/map_*.md`` (neuron experts) and ``docs/results/compare_*.md`` (all others). No
torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from moesaic.methods import get_config
from moesaic.targets import AUTO, OWN

UNNAMED = "auto"
"""As the name of a method: choose one."""


@dataclass(frozen=True)
class Choice:
    """A method, what is set beside its defaults, and why it was taken."""

    method: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)


_NEURONS = Choice("neuron_experts", "it lost least of all methods at an equal share of neurons")
_STATIC = Choice("token_clusters", "one expert, refitted: it lost least of all narrower dense models", {"experts": 1})
_COPIES = Choice(
    "token_clusters",
    "it lost least of what stock architectures hold. Its experts are copies, so the output is larger; --dense-layers "
    "auto loses less and takes about three times as long",
)
_LAYOUT = Choice("cmoe", "it has the layout, router or options that are given")


def choose_method(target: str, options: Collection[str] = (), *, router: bool = False) -> Choice:
    """The method where none is named.

    Args:
        target: As asked for.
        options: Names of the method options that are given: a method that has not all of them is not taken.
        router: A linear router is asked for.
    """
    candidates = list(_candidates(target, router=router))
    for choice in candidates:
        if set(options) <= get_config(choice.method).model_fields.keys():
            return choice
    return candidates[0]


def _candidates(target: str, *, router: bool) -> Iterator[Choice]:
    if not router:
        yield {AUTO: _NEURONS, OWN: _NEURONS, "dense": _STATIC}.get(target, _COPIES)
    yield _LAYOUT

"""The page "Does it pay for me?": by engine, regime, memory and allowed loss, what is fastest or smallest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.payoff.measured import Found, Regime, complete
from benchmarks.payoff.points import ENGINES, is_conversion

LOSSES = (0.01, 0.05, 0.2, 0.5)
"""Of perplexity, over the dense model of the engine, that a user allows."""

INTRO = """# Does it pay for me?

`python -m benchmarks.payoff page` writes this page from [the figures](../results/payoff.md), which have intervals and
conditions. A cell is the best of all that was measured: the dense model in fewer bits, pruned, or converted.
What was not as fast as dense in every round is left out. Conversions are **bold**. Look for your engine, for what you
wait for (decoding, or reading prompts), and for the loss of perplexity that you allow.

* `dense-q8_0` is the dense model in that type of GGUF. `static-50` is pruned to half the FFN neurons and refitted.
* `copies-50` (token clusters) and `cmoe-50` are experts in a stock architecture. `neurons-50` and `union-50` are our
  own architecture in transformers. The number is the share of FFN neurons that a token uses, in percent.
* Behind a point stands how many times as fast it is as the dense model in f16 or bf16 in the same engine.
* In transformers the dense model in fewer bits is no point here. torch's int8 decodes 1.05 to 1.37 times as fast as
  neuron experts of 50 %, and loses less ([decode](../results/decode.md)). Its prompts take two to eight times as long
  as those of the dense model. Where that does not matter, it takes the place of `neurons-50` on two threads. On one it
  was not timed.
"""

ANY = "either engine"

OUTRO = """
## What the figures do not change

* **Memory alone: no.** A conversion stores all of its experts. A file of few bits is smaller, and so is a pruned model.
* **Only fewer bytes, at equal loss: no.** 8-bit weights lose nearly nothing, and every engine runs them.
* **Study or training of experts: yes**, as that is what a conversion is. [Tuning](../tuning.md) recovers much of the
  loss; tuned models are not in these tables.
* **GPUs: unknown.** Nothing here was measured on one.
* **Other sizes**: [the account of overheads](../results/payoff.md) says what size would change an answer.
"""


def fastest(entries: Sequence[Found], regime: Regime, loss: float) -> Found | None:
    """Of those that lose at most so much, the one of most tokens per second. What is slower than the dense model of its
    engine in any round is no answer: such gains are noise."""
    steady = [one for one in complete(entries, regime) if one.paces[regime].low >= 1]
    return max(_within(steady, loss), key=lambda one: one.paces[regime].tokens, default=None)


def smallest(entries: Sequence[Found], loss: float) -> Found | None:
    """Of those that lose at most so much, the one of fewest megabytes stored."""
    sized = [one for one in entries if one.stored_megabytes is not None]
    return min(_within(sized, loss), key=lambda one: one.stored_megabytes or 0.0, default=None)


def _within(entries: Sequence[Found], loss: float) -> list[Found]:
    return [one for one in entries if one.over_dense is not None and one.over_dense.ratio <= 1 + loss]


def guide(models: Mapping[str, Sequence[Found]]) -> str:
    """The whole page."""
    lines = [INTRO.strip()]
    counts: dict[str, list[bool]] = {}
    for name, entries in models.items():
        if not any(one.over_dense for one in entries):
            lines += ["", f"## {name}", "", "No loss is measured yet, so nothing can be said."]
            continue
        heads = ["", *(f"lose at most {100 * loss:g} %" for loss in LOSSES)]
        lines += ["", f"## {name}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines.append(_row("smallest file", lambda loss, own=entries: smallest(own, loss), _megabytes))
        for label, regime, own in _questions(entries):
            answers = [fastest(own, regime, loss) for loss in LOSSES]
            if any(is_conversion(one.point) for one in complete(own, regime)):
                counts.setdefault(f"{name}, {label.partition(',')[0]}", []).extend(
                    is_conversion(one.point) for one in answers if one is not None
                )
            lines.append(_row(label, lambda loss, own=own, at=regime: fastest(own, at, loss), _speed(regime, label)))
        if not any(one.paces for one in entries):
            lines += ["", "The speeds are not measured yet, so the rows of engines are missing."]
        if unknown := [one.point.key for one in entries if one.over_dense is None]:
            lines += ["", f"No answer here, as their loss is not measured yet: {', '.join(unknown)}."]
    lines += ["", "## In how many cells a conversion is the answer", ""]
    lines += [f"* {key}: {sum(own)} of {len(own)}." for key, own in counts.items()] or [
        "No conversion is both timed and judged yet."
    ]
    return "\n".join(lines) + "\n" + OUTRO


def _questions(entries: Sequence[Found]) -> list[tuple[str, Regime, list[Found]]]:
    """Rows of speed: engine by engine, then either engine."""
    found = []
    regimes = sorted({r for one in entries for r in one.paces}, key=lambda r: (r.kind, r.batch, r.threads))
    for engine in (*ENGINES, ANY):
        own = [one for one in entries if engine in (one.point.engine, ANY)]
        found += [(f"{engine}, {regime.label}", regime, own) for regime in regimes if complete(own, regime)]
    return found


def _row(label: str, answer: Callable[[float], Found | None], about: Callable[[Found], str]) -> str:
    cells = []
    for loss in LOSSES:
        one = answer(loss)
        if one is None:
            cells.append("none")
            continue
        mark = "**" if is_conversion(one.point) else ""
        cells.append(f"{mark}{one.point.key}{mark} {about(one)}")
    return f"| {label} | {' | '.join(cells)} |"


def _megabytes(one: Found) -> str:
    return f"({one.stored_megabytes:.0f} MB)"


def _speed(regime: Regime, label: str) -> Callable[[Found], str]:
    if label.startswith(ANY):
        return lambda one: f"({one.paces[regime].tokens:.0f} tok/s)"
    return lambda one: f"({one.paces[regime].ratio:.2f}x)"

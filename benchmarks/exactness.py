"""Every family, converted by each kind of method in two dtypes: what all experts on differ from the original.

    python -m benchmarks.exactness                       # all, some five hundred conversions
    python -m benchmarks.exactness deepseek_v3 apertus   # these rows of tests/tiny_models.py

Widths are odd and every bias of a family is on in one of its rows. Each conversion is verified, generates with and
without cache, and is undone. ``tests/jobs/test_families.py`` does the same for one method and dtype of each family.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.tiny_models import PAD, TINY, build_tiny
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.anatomy import FAMILIES
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs.undo import undo

METHODS: dict[str, dict[str, Any]] = {
    "mlpmoe": {"branches": 5},  # 5 divides no width
    "cmoe": {"layout": "S2A3E5"},
    "token_clusters": {"split": "disjoint", "experts": 5, "active": 0.5, "refit": "none"},
    "neuron_experts": {"active": 0.3},
}
HIERARCHICAL = tuple(method for method in METHODS if method != "neuron_experts")
"""Those that convert the experts of an existing MoE."""
DTYPES = ("bfloat16", "float32")
BOUND = 1e-5


@dataclass(frozen=True)
class Exactness:
    """What a conversion kept.

    Attributes:
        partition: Every FFN holds each of its neurons once.
        logits: All experts on beside the original, relative to its largest logit: the conversion's own check, and
            stock transformers on the folder; the larger.
        oracle: As it routes beside the oracle, relative to the largest logit.
        cached: Generation is the same with and without cache; of MiniMax, which differs of itself, as the original's.
        restored: ``undo`` gives every tensor back, bit for bit.
    """

    partition: bool
    logits: float
    oracle: float
    cached: bool
    restored: bool

    @property
    def exact(self) -> bool:
        """Whether all of it is as it must be."""
        return self.partition and self.cached and self.restored and max(self.logits, self.oracle) <= BOUND


def exactness(row: str, method: str, dtype: str, folder: Path) -> Exactness:
    """Convert the tiny model of a row of ``tests/tiny_models.py`` from end to end, in ``folder``."""
    moe = FAMILIES[TINY[row].model_type].moe is not None
    source = build_tiny(row, folder / "source", d_ff=37 if moe else None, dtype=dtype)
    done = moesaic.convert(
        source,
        folder / "out",
        method=method,
        options=METHODS[method],
        calibration={"tokens": 256, "window": 64},
        target="moesaic",
        hierarchical=moe,
    )
    parity = done.results["parity"]
    logits, cached = _runs(source, folder / "out")
    dense, back = Checkpoint(source), Checkpoint(undo(folder / "out", folder / "dense"))
    same = set(dense.names) == set(back.names)
    return Exactness(
        partition=all(plan.is_partition for plan in done.blueprint.sites.values()),
        logits=max(parity["all_on"], logits),
        oracle=parity["oracle"],
        cached=cached,
        restored=same and all(torch.equal(dense.tensor(name), back.tensor(name)) for name in dense.names),
    )


@torch.inference_mode()
def _runs(source: Path, out: Path) -> tuple[float, bool]:
    """The largest error of the logits with all experts on, and whether the cache changes nothing."""
    # Stock grouped products want rows of whole 16 bytes, and widths are odd here.
    eager = {"dtype": torch.float32, "experts_implementation": "eager"}
    dense: Any = AutoModelForCausalLM.from_pretrained(source, **eager).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(out, **eager).eval()
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    model.exact_prefill(False)  # else all is a prompt without the cache
    cached = torch.equal(*_generated(model, ids))
    model.all_experts_on()
    if not cached:
        original = _generated(dense, ids)
        cached = not torch.equal(*original) and all(map(torch.equal, original, _generated(model, ids)))
    expected = dense(input_ids=ids, use_cache=False).logits
    found = model(input_ids=ids, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max()), cached


def _generated(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    return [model.generate(ids[:1, :5], use_cache=cached, **options) for cached in (True, False)]


def main(rows: Iterable[str]) -> int:
    """Print a line for each conversion, and the largest error; 1 where one is not exact."""
    largest, failed = 0.0, []
    for row in rows:
        for method in METHODS if FAMILIES[TINY[row].model_type].moe is None else HIERARCHICAL:
            for dtype in DTYPES:
                with tempfile.TemporaryDirectory() as folder:
                    found = exactness(row, method, dtype, Path(folder))
                largest = max(largest, found.logits)
                print(f"{row:20} {method:15} {dtype:9} {found.logits:.1e} {found.oracle:.1e} exact: {found.exact}")
                if not found.exact:
                    failed.append((row, method, dtype, found))
    print(f"largest error of the logits with all experts on: {largest:.1e}; not exact: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TINY))

"""What every method promises, whatever it does. A new method adds a row to ``ROWS``.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import moesaic
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.methods import METHODS, get_config, get_method
from moesaic.methods.base import MethodConfig, MethodModule
from moesaic.nn.ffn import FFNWeights
from moesaic.options import build
from tests.ffns import random_ffn, random_inputs, relative_error, sum_of_parts
from tests.tiny_models import build_tiny

Covers = Literal["partition", "once", "copies", "some"]


@dataclass(frozen=True)
class Row:
    """A method with some options.

    Attributes:
        method: Its name.
        covers: What becomes of the neurons. partition: each stands once, unmodified, so that all experts on equal the
            dense FFN. once: each stands once, and matrices are new. copies: experts may share them. some: not all stay,
            none stands twice.
        options: Its options.
        refused: Options, and a number of neurons that they cannot split, whether at all or of so few.
        random: Another seed makes another plan.
    """

    method: str
    covers: Covers
    options: dict[str, Any]
    refused: tuple[dict[str, Any], int] = ({"layout": "S3A3E8"}, 7)
    random: bool = False

    def config(self, **changes: Any) -> MethodConfig:
        """The options as the method's own config."""
        return build(get_config(self.method), self.options | changes, self.method)


TEXT = {"sources": ["tiny"], "tokens": 256, "window": 32, "compute_dtype": "float32"}
TRAIN = {"steps": 2, "batch": 1, "held_out": 1, "eval_every": 2, "save_every": 2, "precision": "fp32"}
TOO_MANY = ({"split": "disjoint", "experts": 64}, 40)
ROWS = {
    "cmoe": Row("cmoe", "partition", {"layout": "S3A3E8"}),
    "mlpmoe": Row("mlpmoe", "partition", {"branches": 8}, ({"branches": 38}, 37)),
    "mlpmoe, pruned": Row(
        "mlpmoe", "some", {"branches": 8, "keep": 5, "prune_which": "random"}, ({"branches": 38}, 37), random=True
    ),
    "mlpmoe, oracle": Row(
        "mlpmoe", "some", {"branches": 8, "keep": 5, "prune_factor": "oracle"}, ({"branches": 38}, 37)
    ),
    "moefication": Row("moefication", "partition", {"layout": "S3A3E8"}, random=True),
    "llama_moe": Row("llama_moe", "partition", {"layout": "S1A3E8"}, random=True),
    "llama_moe, centroids": Row("llama_moe", "partition", {"layout": "S1A3E8", "router": "centroids"}, random=True),
    "tomoe": Row(
        "tomoe", "copies", {"counted": "ffn", "experts": 4, "train": TRAIN}, ({"active": 0.1}, 5), random=True
    ),
    "tomoe, union": Row(
        "tomoe",
        "copies",
        {"counted": "ffn", "experts": 4, "union": True, "train": TRAIN},
        ({"active": 0.1}, 5),
        random=True,
    ),
    "token_clusters": Row("token_clusters", "copies", {"experts": 4}, ({"max_params": 0.5}, 40), random=True),
    "token_clusters, union": Row(
        "token_clusters",
        "copies",
        {"split": "union", "experts": 4},
        ({"split": "union", "max_params": 0.7}, 40),
        random=True,
    ),
    "token_clusters, equal union": Row(
        "token_clusters", "copies", {"split": "union", "experts": 4, "widths": "equal"}, TOO_MANY, random=True
    ),
    "token_clusters, disjoint": Row(
        "token_clusters", "once", {"split": "disjoint", "experts": 8, "shared": 0.5}, TOO_MANY, random=True
    ),
    "token_clusters, static": Row("token_clusters", "some", {"experts": 1}, TOO_MANY),
    "secret_moe": Row(
        "secret_moe", "once", {"width": 4, "rank": 3, "steps": 4, "batch": 64}, ({"width": 1}, 4864), True
    ),
    "secret_moe, copies": Row(
        "secret_moe",
        "copies",
        {"split": "overlapping", "max_params": 8.0, "steps": 4},
        ({"max_params": 0.5, "split": "overlapping"}, 40),
        random=True,
    ),
    "neuron_experts": Row("neuron_experts", "partition", {"active": 0.5}, ({"active": 0.01}, 37)),
    "neuron_experts, threshold": Row(
        "neuron_experts", "partition", {"choice": "threshold", "bits": 3}, ({"active": 0.01}, 37)
    ),
    "neuron_experts, refitted": Row("neuron_experts", "once", {"refit": True, "bits": 2}, ({"active": 0.01}, 37)),
    "neuron_experts, int8": Row("neuron_experts", "once", {"weights": "int8"}, ({"weights": "int8", "bits": 3}, 37)),
    "static": Row("static", "some", {"active": 0.75}),
    "random": Row("random", "partition", {"layout": "S3A3E8"}, random=True),
}
SITE_ROWS = {name: row for name, row in ROWS.items() if not get_config(row.method).whole_model}
PARTITIONS = {name: row for name, row in ROWS.items() if row.covers == "partition"}
over = pytest.mark.parametrize
rows = over("row", ROWS.values(), ids=ROWS)
site_rows = over("row", SITE_ROWS.values(), ids=SITE_ROWS)


def text(d_model: int = 16) -> Tensor:
    """Tokens of four groups, so that there is something to route by."""
    group_T = torch.randint(4, (300,), generator=torch.Generator().manual_seed(2))
    return random_inputs(300, d_model, dtype=torch.float32) * 0.3 + 3 * torch.eye(d_model)[group_T]


def plan_site(row: Row, weights: FFNWeights, inputs: Tensor | None, seed: int = 0, **changes: Any) -> LayerPlan:
    method = cast(MethodModule, get_method(row.method))
    return method.plan_site(weights, None if inputs is None else SiteInputs(inputs), row.config(**changes), seed)


@cache
def dense(d_ff: int, folder: Path) -> Path:
    return build_tiny("llama", folder / f"dense-{d_ff}", d_ff=d_ff, dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


def plans_of(row: Row, folder: Path, d_ff: int = 40, seed: int = 0) -> dict[str, LayerPlan]:
    """By path: of one FFN, or of a tiny model where the method decides all at once."""
    if not row.config().whole_model:
        weights = random_ffn(d_ff, dtype=torch.bfloat16)
        return {"ffn": plan_site(row, weights, text() if row.config().needs_calibration() else None, seed)}
    settings = {"method": row.method, "options": row.options, "calibration": TEXT, "seed": seed}
    return decide(prepare(check_request(dense(d_ff, folder), ConvertSettings.model_validate(settings)))).sites


def digest(plans: dict[str, LayerPlan]) -> str:
    return Blueprint("llama", "source", "method", {}, plans).digest()


def real(index: Tensor) -> list[int]:
    """The neurons of an index set, without padding."""
    return index[index >= 0].tolist()


def sizes_of(plan: LayerPlan) -> list[int]:
    return [len(real(expert)) for expert in plan.experts]


def test_every_method_has_a_row() -> None:
    assert {row.method for row in ROWS.values()} == set(METHODS)


@rows
@over("d_ff", [37, 40])
def test_experts_are_balanced_and_cover_what_is_promised(row: Row, d_ff: int, folder: Path) -> None:
    for plan in plans_of(row, folder, d_ff).values():
        counts = sizes_of(plan)
        assert plan.varied or max(counts, default=0) - min(counts, default=0) <= 1
        for index in (plan.shared, *plan.experts):
            assert len(set(real(index))) == len(real(index))
        assert all(set(real(expert)).isdisjoint(real(plan.shared)) for expert in plan.experts)
        stored = sorted(real(plan.packed))
        assert plan.is_partition == (row.covers == "partition")
        if row.covers in ("partition", "once"):
            assert stored == list(range(d_ff))
        elif row.covers == "some":
            assert len(stored) < d_ff
            assert len(set(stored)) == len(stored)


@over("row", PARTITIONS.values(), ids=PARTITIONS)
@over(("gated", "biases"), [(True, False), (True, True), (False, True)])
def test_all_experts_on_equal_the_dense_ffn(row: Row, gated: bool, biases: bool) -> None:
    weights = random_ffn(37, gated=gated, biases=biases, activation="silu" if gated else "gelu_new")
    x_TD = text().double()
    plan = plan_site(row, weights, x_TD)
    assert relative_error(sum_of_parts(weights, plan, x_TD), weights(x_TD)) < 1e-12


@over("row", {row.method: row for row in reversed(ROWS.values())}.values(), ids=lambda row: row.method)
def test_a_tiny_model_is_converted_and_verified(row: Row, folder: Path, tmp_path: Path) -> None:
    settings = {"method": row.method, "options": row.options, "calibration": TEXT, "target": "moesaic"}
    made = moesaic.convert(dense(40, folder), tmp_path / "out", settings=settings)
    assert len(made.blueprint.sites) == 2
    assert made.results["parity"]["oracle"] < 1e-5


def with_layouts() -> Iterator[Any]:
    """Methods whose sizes a layout decides, with layouts at the edge: all shared, all on, experts of one neuron."""
    for name, row in PARTITIONS.items():
        if "layout" in row.options:
            for layout in ("S0A8E8", "S8A0E8", "S0A1E37", "S36A1E37", "S1A1E2"):
                yield pytest.param(row, layout, id=f"{name}-{layout}")


@over(("row", "layout"), list(with_layouts()))
def test_every_layout_is_a_balanced_partition(row: Row, layout: str) -> None:
    plan, shape = plan_site(row, random_ffn(37), text(), layout=layout), row.config(layout=layout).sizes(37)
    assert plan.is_partition
    assert sorted(sizes_of(plan)) == sorted(shape.own)
    assert len(plan.shared) == shape.shared
    assert plan.top_k == shape.top_k


@rows
def test_the_sizes_known_before_are_those_of_the_plan(row: Row, folder: Path) -> None:
    said, plans = row.config().sizes(40), list(plans_of(row, folder).values())
    for plan in plans:
        made = plan.shape
        for name in ("d_ff", "experts", "top_k", "router", "gate", "varied", "normalised", "rewritten", "output_bias"):
            assert getattr(made, name) == getattr(said, name), name
        assert (made.union is None) == (said.union is None)
        if not row.config().whole_model:
            assert made.shared == said.shared
            assert plan.active_neurons == pytest.approx(said.active, abs=0.5)
            assert (len(plan.packed) <= said.neurons) if plan.union else (len(plan.packed) == said.neurons)
    # one neuron per FFN is what training a whole model may leave over
    assert sum(plan.active_neurons for plan in plans) / len(plans) == pytest.approx(said.active, abs=1)


@rows
def test_the_seed_alone_decides_and_matters_where_the_method_is_random(row: Row, folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (plans_of(row, folder, seed=seed) for seed in (3, 3, 11))
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(first) == digest(again)
    assert (digest(first) != digest(other)) == row.random
    Blueprint("llama", "source", "method", {}, first).save(tmp_path)
    assert Blueprint.load(tmp_path).digest() == digest(first)


@site_rows
def test_it_reads_text_exactly_where_it_says_so(row: Row) -> None:
    weights = random_ffn(40)
    if row.config().needs_calibration():
        for inputs in (None, text()[:0]):
            with pytest.raises(InputError):
                plan_site(row, weights, inputs)
    else:
        without, with_text = (plan_site(row, weights, inputs) for inputs in (None, text()))
        assert digest({"ffn": without}) == digest({"ffn": with_text})


@rows
def test_what_cannot_be_split_is_refused_before_and_by_the_method_itself(row: Row) -> None:
    options, d_ff = row.refused
    refused = replace(row, options=options)
    with pytest.raises(InputError):
        refused.config().check(d_ff)
    if not row.config().whole_model:
        with pytest.raises(InputError):
            plan_site(refused, random_ffn(d_ff, 4), text(4))


@rows
def test_options_are_frozen_and_unknown_ones_refused(row: Row) -> None:
    config = row.config()
    with pytest.raises(ValidationError):
        config.__class__(**row.options, layuot="S3A3E8")
    with pytest.raises(ValidationError):
        setattr(config, next(iter(row.options)), None)
    assert config.__class__(**config.model_dump(mode="json")) == config


@rows
@over(("d_ff", "tokens"), [(40, 1), (40, 10_000), (4864, 10_000)])
def test_work_and_memory_are_never_negative(row: Row, d_ff: int, tokens: int) -> None:
    assert row.config().operations(d_ff, 16, tokens) >= 0
    assert row.config().held(d_ff, tokens) >= 0

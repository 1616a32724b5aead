"""Every path of the runtime against the oracle, what it refuses, and which one is taken.

Axes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.modeling_moesaic import MoesaicForCausalLM
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_paths import ANY, PATHS, Row, choose
from moesaic.nn.reference import reference_ffn
from tests.ffns import random_ffn, random_inputs, relative_error
from tests.nn.plans import as_union, neuron_plan, plan_of, random_members, random_plan, unpadded

BOUNDS = {
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
    torch.float64: 1e-6,
}  # routers and their weights are fp32


class Knows(NamedTuple):
    """What a path computes: layouts of which it does so with routing, or where nothing is routed; on what."""

    routed: frozenset[str] = frozenset()
    unrouted: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = tuple(BOUNDS)
    devices: tuple[str, ...] = ("cpu", "cuda")
    cases: tuple[str, ...] | None = None
    """Names of ``CASES`` of these layouts that it computes; None for all."""
    trains: bool = True
    """Whether it computes where gradients are wanted."""


BOTH = frozenset({"packed", "union"})
ALL = BOTH | {"neurons", "nested"}
PATHS_KNOWN = {
    "every": Knows(unrouted=ALL),
    "masked": Knows(routed=ALL),
    "sorted": Knows(routed=BOTH),
    "rows": Knows(
        routed=ALL,
        unrouted=ALL,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        devices=("cpu",),
        trains=False,
    ),
    **dict.fromkeys(
        ("fused", "fused_sorted"),
        Knows(
            routed=BOTH,
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            devices=("cpu",),
            trains=False,
        ),
    ),
    # On a CPU only in Triton's interpreter: see test_triton.py.
    **dict.fromkeys(
        ("triton_rows", "triton_grouped"),
        Knows(
            routed=BOTH,
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            devices=("cuda",),
            trains=False,
        ),
    ),
}
"""A new path is a row here."""


def routed_paths(layout: str) -> list[str]:
    """Names of the paths that compute everything that is routed, for tests about something else."""
    return [
        name
        for name, knows in PATHS_KNOWN.items()
        if layout in knows.routed and knows.cases is None and knows.trains and "cpu" in knows.devices
        if set(knows.dtypes) == set(BOUNDS)
    ]


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOKENS = (1, 2, 5, 70)

Case = Callable[[torch.dtype], tuple[FFNWeights, LayerPlan]]


def packed(
    layout: str, router: str = "linear", gate: str = "uniform", extra: str = "plain", d_ff: int = 37, **weights: Any
) -> Case:
    """A partition in runs of rows."""

    def make(dtype: torch.dtype) -> tuple[FFNWeights, LayerPlan]:
        ffn = random_ffn(d_ff, dtype=dtype, **weights)
        return ffn, random_plan(ffn, layout, router, gate, extra)

    return make


def union(
    stored: Callable[[LayerPlan], LayerPlan], shared: int, top_k: int = 2, gate: str = "uniform", **w: Any
) -> Case:
    """Experts that share rows."""

    def make(dtype: torch.dtype) -> tuple[FFNWeights, LayerPlan]:
        plan = plan_of(random_members(5, 37, 0.4), torch.arange(shared), top_k, gate=gate)
        return random_ffn(37, dtype=dtype, **w), stored(plan)

    return make


def neurons(d_model: int = 16, readout: bool = False, threshold: float | None = None, **options: Any) -> Case:
    """Every neuron an expert; ``options`` of the FFN, and of the router bits and group."""
    router = {name: options.pop(name) for name in ("bits", "group", "active", "int8") if name in options}

    def make(dtype: torch.dtype) -> tuple[FFNWeights, LayerPlan]:
        ffn = random_ffn(37, d_model, dtype=dtype, **options)
        return ffn, neuron_plan(ffn, threshold=threshold, readout=readout, **router)

    return make


CASES: dict[str, Case] = {
    "shared": packed("S3A3E8"),
    "none shared": packed("S0A3E7"),
    "an even width": packed("S1A1E4", d_ff=16),
    "many narrow experts": packed("S1A3E16"),
    "multiples of 16": packed("S2A2E6", d_ff=96),
    "multiples of 16, weighed": packed("S0A2E6", "linear", "softmax_topk", d_ff=96),
    "all chosen": packed("S0A3E3"),
    "scaled": packed("S2A2E7", "gated", "scaled", "selection_bias"),
    "softmax": packed("S2A2E7", "low_rank", "softmax_topk"),
    "sigmoid": packed("S0A2E7", "linear_bias_normalised", "sigmoid", "selection_bias"),
    "biases": packed("S2A2E7", "gated_biases", biases=True),
    "other weights": packed("S2A2E7", extra="changed_weights"),
    "ungated": packed("S2A2E7", "gated_ungated", "sigmoid", gated=False, biases=True, activation="gelu_new"),
    "static": packed("S2A2E7", "static", biases=True),
    "only shared": packed("S4A0E4", "static"),
    "union": union(as_union, 5),
    "union, none shared, weighed": union(as_union, 0, gate="sigmoid"),
    "union, widths of their own": union(unpadded, 9, 1, biases=True),
    "union, ungated": union(unpadded, 0, 5, gated=False, activation="gelu_new"),
    "neurons": neurons(),
    "neurons, 3 bits, an odd width": neurons(69, bits=3, biases=True),
    "neurons, 2 bits, wide groups": neurons(200, bits=2, group=128, active=0.2, readout=True),
    "neurons, ungated": neurons(130, group=64, gated=False, biases=True, activation="gelu_new"),
    "neurons, ungated, by threshold": neurons(threshold=0.1, gated=False, activation="relu"),
    "neurons, by threshold": neurons(96, threshold=0.05, bits=3, biases=True),
    "neurons, all": neurons(active=1.0),
    "int8": neurons(int8=True),
    "int8, an odd width": neurons(97, int8=True, biases=True, active=0.3),
    "int8, ungated, by threshold": neurons(130, int8=True, threshold=0.1, gated=False, biases=True, activation="relu"),
    "int8, all": neurons(128, int8=True, active=1.0),
}


@cache
def expected(name: str, dtype: torch.dtype, all_on: bool) -> Tensor:
    """The oracle's output for the most tokens, in float64 from the weights in ``dtype``."""
    weights, plan = CASES[name](dtype)
    x_TD = random_inputs(max(TOKENS), weights.d_model, dtype=dtype)
    return reference_ffn(weights.to(torch.float64), plan, x_TD.double(), all_experts_on=all_on)


def test_every_path_has_its_row() -> None:
    assert {row.path.name for row in PATHS} == PATHS_KNOWN.keys()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS_KNOWN)
def test_a_path_computes_what_the_oracle_says_or_is_refused(
    path: str, case: str, dtype: torch.dtype, device: str
) -> None:
    knows, ffn = PATHS_KNOWN[path], build_ffn(*CASES[case](dtype)).to(device)
    x_TD = random_inputs(max(TOKENS), ffn.up_proj.in_features, dtype=dtype).to(device)
    for all_on in (False, True):
        ffn.all_experts_on = all_on
        layouts = knows.routed if ffn.routed else knows.unrouted
        known = ffn.layout in layouts and case in (knows.cases or CASES)
        known = known and dtype in knows.dtypes and device in knows.devices
        for tokens, training in itertools.product(TOKENS, (False, True)):  # training takes out-of-place operations
            x = x_TD[:tokens].clone().requires_grad_(training)
            with use_path(ffn, path), torch.set_grad_enabled(training):
                if not known or (training and not knows.trains):
                    with pytest.raises(ValueError, match=f"^path {path} cannot compute .*; these can: [a-z_, ]+$"):
                        ffn(x)
                    continue
                y_TD = ffn(x).detach()
            assert y_TD.dtype == dtype
            error = relative_error(y_TD.cpu().double(), expected(case, dtype, all_on)[:tokens])
            assert error < BOUNDS[dtype], (tokens, training, all_on)


def taken(case: str, tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    ffn = build_ffn(*CASES[case](dtype)).to(device)
    return choose(torch.empty(tokens, 16, dtype=dtype, device=device), ffn).name


@pytest.mark.parametrize(
    ("case", "dtype", "sorted_from"),
    [
        ("shared", torch.float32, 5),
        ("shared", torch.bfloat16, 64),
        ("union", torch.float32, 64 * 5),
        ("union", torch.bfloat16, 64 * 5),
    ],
)
def test_few_tokens_are_masked_and_many_sorted(case: str, dtype: torch.dtype, sorted_from: int) -> None:
    assert [taken(case, tokens, dtype) for tokens in (0, 1, sorted_from - 1)] == ["masked"] * 3
    assert [taken(case, tokens, dtype) for tokens in (sorted_from, 5000)] == ["sorted"] * 2
    assert taken(case, 5000, dtype, "meta") == "masked"  # as many as chose an expert cannot be known


def test_what_routes_nothing_computes_every_neuron() -> None:
    assert {taken("static", tokens) for tokens in (1, 5000)} == {"every"}


class Halved:
    """Half of what is right, of few tokens: to be told from the others."""

    name, layout = "halved", "packed"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed and x_TD.dtype == torch.float32

    def run(self, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
        return PATHS[1].path.run(ffn, x_TD) / 2


@pytest.mark.parametrize(
    ("fastest", "begin", "end"),
    [
        ({}, 0, 0),
        ({ANY: (0, None)}, 0, 99),
        ({("cpu", torch.float32): (2, 9), ANY: (0, None)}, 2, 9),
        ({(None, torch.float32): (2, None), ("cuda", torch.float32): (0, None)}, 2, 99),
    ],
)
def test_a_path_of_an_own_table_is_taken_where_it_was_the_fastest_and_whenever_asked_for(
    fastest: dict[Any, Any], begin: int, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MoEFeedForward, "table", (Row(Halved(), fastest), *PATHS))
    ffn, x_TD = build_ffn(*CASES["shared"](torch.float32)), random_inputs(70, dtype=torch.float32)
    for tokens in range(1, 70):
        assert (choose(x_TD[:tokens], ffn).name == "halved") == (begin <= tokens < end)
    with torch.no_grad():
        right_TD = build_ffn(*CASES["shared"](torch.float64))(x_TD.double())
        with use_path(ffn, "halved"):
            torch.testing.assert_close(ffn(x_TD).double(), right_TD / 2, rtol=1e-4, atol=1e-6)
        with use_path(ffn, "halved", "masked"):
            assert choose(x_TD.double(), ffn).name == "masked"


@pytest.mark.parametrize(("layout", "end"), [("S0A2E8", 32), ("S2A2E8", 16), ("S0A8E8", 8), ("S0A1E8", 50)])
def test_a_path_may_be_the_fastest_only_up_to_so_much_work(
    layout: str, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(Halved(), {("cpu", None): (1, 50)}, most_work={torch.float32: (8, 99)})
    monkeypatch.setattr(MoEFeedForward, "table", (row, *PATHS))
    ffn = build_ffn(*packed(layout, d_ff=32)(torch.float32))
    assert [tokens for tokens in range(70) if choose(torch.empty(tokens, 16), ffn).name == "halved"] == [*range(1, end)]


def test_asking_ends_with_the_block_also_by_an_error_and_may_be_nested() -> None:
    ffn = build_ffn(*CASES["shared"](torch.float32))
    x_TD = random_inputs(3, dtype=torch.float64)
    with use_path(ffn, "sorted"):
        with pytest.raises(RuntimeError, match="dtype"), use_path(nn.Sequential(ffn), "masked"):
            ffn(x_TD)
        assert choose(x_TD, ffn).name == "sorted"
    assert choose(x_TD, ffn).name == "masked"


def test_strangers_are_refused_before_anything_is_computed() -> None:
    ffn = build_ffn(*CASES["shared"](torch.float32))
    with pytest.raises(ValueError, match=f"^there is no path 'fast'; there are {', '.join(sorted(PATHS_KNOWN))}$"):
        use_path(ffn, "masked", "fast").__enter__()
    with pytest.raises(ValueError, match=r"^Linear holds no FFN of experts$"):
        use_path(nn.Linear(2, 2), "masked").__enter__()
    assert ffn.asked == ()


def test_a_model_asks_all_its_ffns() -> None:
    model = nn.ModuleList([build_ffn(*CASES[name](torch.float32)) for name in ("shared", "union", "static")])
    with MoesaicForCausalLM.use_path(model, "masked", "every"):  # type: ignore[arg-type]
        assert {ffn.asked for ffn in model} == {("masked", "every")}

"""The kernel as operators of torch: what `torch.compile` makes of FFNs whose weights lie side by side.

Axes: T tokens, D model width.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.nn import moesaic_operators, moesaic_path_rows
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_nested import NestedFeedForward
from moesaic.nn.moesaic_operators import NAMESPACE
from moesaic.nn.moesaic_path_nested_rows import NESTED
from moesaic.nn.moesaic_path_nested_rows import _tensors as nested_tensors
from moesaic.nn.moesaic_path_neuron_rows import NEURONS
from moesaic.nn.moesaic_path_rows import ROWS
from tests.ffns import relative_error
from tests.nn import test_neuron_kernel, test_rows

D = 64
FFNS: dict[str, Callable[[], MoEFeedForward]] = {
    "packed": lambda: test_rows.ffn_of(D),
    "packed, biases": lambda: test_rows.ffn_of(D, biases=True, activation="gelu_new"),
    "union": lambda: test_rows.ffn_of(D, union=True),
    "union, no gate": lambda: test_rows.ffn_of(D, torch.float32, union=True, gated=False),
    "neurons": lambda: test_neuron_kernel.ffn_of(D),
    "neurons, 3 bits, no gate": lambda: test_neuron_kernel.ffn_of(D, bits=3, gated=False, biases=True),
    "neurons, threshold": lambda: test_neuron_kernel.ffn_of(D, threshold=0.1),
    "rows, neurons": lambda: unrouted(test_neuron_kernel.ffn_of(D)),
    "nested": lambda: test_neuron_kernel.ffn_of(D, int8=True),
    "nested, no gate, biases": lambda: test_neuron_kernel.ffn_of(D, int8=True, gated=False, biases=True),
    "nested, threshold": lambda: test_neuron_kernel.ffn_of(D, int8=True, threshold=0.1),
    "nested, unrouted": lambda: unrouted(test_neuron_kernel.ffn_of(D, int8=True)),
}
OPERATORS = {"packed": ROWS, "union": ROWS, "rows": ROWS, "neurons": NEURONS, "nested": NESTED}


def unrouted(ffn: MoEFeedForward) -> MoEFeedForward:
    ffn.all_experts_on = True
    ffn.asked = ("rows",)
    return ffn


def compiled(ffn: nn.Module, x_TD: Tensor) -> tuple[Tensor, list[Any]]:
    """The output of what torch compiles in one piece, and which of our operators are in it."""
    own: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        own.extend(node.target for node in module.graph.nodes if NAMESPACE in str(node.target))
        return module.forward

    torch._dynamo.reset()
    return torch.compile(ffn, backend=backend, fullgraph=True)(x_TD), own


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", FFNS)
def test_a_compiled_ffn_calls_the_kernel_and_gives_the_same_bits(name: str, tokens: int) -> None:
    ffn = FFNS[name]()
    x_TD = torch.randn(tokens, D).to(torch.float32 if name == "union, no gate" else torch.bfloat16)
    with torch.inference_mode():
        expected = ffn(x_TD)  # lays the weights
        found, own = compiled(ffn, x_TD)
    assert own == [OPERATORS[name.split(",")[0]]]
    assert torch.equal(found, expected)


def test_weights_that_do_not_lie_yet_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, x_TD = test_rows.ffn_of(D, torch.float32), torch.randn(2, D)
    with torch.inference_mode():
        before, own = compiled(ffn, x_TD)
        assert not own
        after = ffn(x_TD)
    assert relative_error(before, after) < 1e-5
    trained, own = compiled(ffn, x_TD.clone().requires_grad_())
    assert not own
    trained.sum().backward()
    with torch.inference_mode():
        monkeypatch.setattr(moesaic_operators, "_is_there", lambda *_: False)  # as where no compiler is
        found, own = compiled(ffn, x_TD)
    assert not own
    assert relative_error(found, after) < 1e-5


def test_an_exported_program_needs_no_kernel() -> None:
    ffn, x_TD = test_rows.ffn_of(D, torch.float32), torch.randn(2, D)
    with torch.no_grad():
        expected = ffn(x_TD)
        program = torch.export.export(ffn, (x_TD,))
        assert NAMESPACE not in str(program.graph)
        assert relative_error(program.module()(x_TD), expected) < 1e-5


def arguments_of_rows() -> list[Any]:
    ffn = test_rows.ffn_of(D)
    x_TD = torch.randn(2, D).bfloat16()
    with torch.inference_mode():
        ffn(x_TD)
    assert ffn.gate_proj is not None
    weights = [layer.weight.detach() for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)]
    return [x_TD, *weights, None, None, torch.tensor([[0, 5], [2, 3]]), None, None, ffn.shared, 6, ffn.width, "silu"]


def test_the_operator_keeps_torchs_rules() -> None:
    torch.library.opcheck(ROWS, tuple(arguments_of_rows()))
    assert ROWS(*[part.to("meta") if isinstance(part, Tensor) else part for part in arguments_of_rows()]).shape == (
        2,
        D,
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (6, torch.tensor([[0, 6], [2, 3]]), "the router chose an expert that does not exist"),
        (6, torch.tensor([[0, 1]]), "choices for 1 of 2 tokens"),
        (0, torch.zeros(2, 32, dtype=torch.bfloat16), "inputs of width 32"),
        (3, torch.zeros(D, 660, dtype=torch.bfloat16), "do not lie"),
        (2, torch.zeros(660, D, dtype=torch.bfloat16).t().contiguous().t(), "do not lie"),
        (2, torch.zeros(659, D, dtype=torch.bfloat16), "shape"),
        (1, torch.zeros(660, D), "dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(place: int, value: Tensor, message: str) -> None:
    arguments = arguments_of_rows()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        ROWS(*arguments)


def test_the_same_files_may_be_loaded_twice() -> None:
    name = "moesaic.nn.moesaic_path_rows_again"
    spec = importlib.util.spec_from_file_location(name, Path(moesaic_path_rows.__file__))
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    sys.modules[name] = again
    try:
        spec.loader.exec_module(again)
    finally:
        del sys.modules[name]
    assert again.ROWS is ROWS


def test_int8_matrices_that_do_not_fit_are_an_error() -> None:
    ffn = test_neuron_kernel.ffn_of(D, int8=True)
    assert isinstance(ffn, NestedFeedForward)
    x_TD = torch.randn(2, D).bfloat16()
    given = [*nested_tensors(ffn), ffn.neurons, D, ffn.top_k, ffn.activation]
    torch.library.opcheck(NESTED, (x_TD, *given))
    for place, value, message in (
        (2, torch.zeros(1, 32, dtype=torch.uint8), "up_codes"),
        (6, torch.zeros(ffn.neurons, 31, dtype=torch.uint8), "codes"),
        (9, torch.zeros(ffn.neurons), "a bias"),
        (11, 32, "inputs of width 64"),
        (12, ffn.neurons + 1, "number of neurons"),
    ):
        wrong = list(given)
        wrong[place] = value
        with pytest.raises(ValueError, match=message):
            NESTED(x_TD, *wrong)

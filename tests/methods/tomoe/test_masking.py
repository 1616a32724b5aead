from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from moesaic.errors import UnsupportedModelError
from moesaic.methods.tomoe.attention import attention_sites
from moesaic.methods.tomoe.gates import Noise, SampledGates
from moesaic.methods.tomoe.masking import Masker
from moesaic.methods.tomoe.task import ToMoETask
from tests.methods.tomoe.tiny import (
    ATTENTION,
    randomise_controller,
    tiny_model,
    tiny_task,
    tokens,
)
from tests.tiny_models import FAMILIES, PRUNES_PAIRS, PRUNES_VALUES

D_HEAD = 8


class Fixed:
    """Gates of given factors, the same for all tokens; None leaves a part alone."""

    def __init__(self, neurons: Tensor, pairs: Tensor | None = None, values: Tensor | None = None) -> None:
        self._neurons, self._pairs, self._values = neurons, pairs, values

    def neurons(self, place: int, x: Tensor) -> Tensor:
        return self._neurons

    def pairs(self, place: int, x: Tensor) -> Tensor | None:
        return None if self._pairs is None else torch.cat([self._pairs, self._pairs])

    def values(self, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._values, self._values


def gates_of(task: ToMoETask, step: int | None = 0, rows: int = 2) -> SampledGates:
    decoded, shift = task.decode()
    noise = Noise(task.seed, step, torch.arange(rows), task.device)
    return SampledGates(task.controller, decoded, None, shift, noise, task.config)


def dense(task: ToMoETask, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return task.base(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [40.0])
def test_all_masks_on_is_the_dense_model_bit_for_bit(family: str, bias: float) -> None:
    """O6, O7: for any routing."""
    attention = ATTENTION[family]
    task = tiny_task(family, attention=attention, bias=bias, preset="paper", active=0.9)
    gates = gates_of(task)
    assert torch.equal(task.run(gates, tokens()), dense(task, tokens()))
    assert len(gates.choices) == 2
    assert bool(torch.stack(gates.masks).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_change_what_every_family_computes(family: str) -> None:
    task = tiny_task(family, active=0.9)
    masks = torch.ones(task.ffns[0].d_ff)
    masks[3] = 0
    logits = task.run(Fixed(masks), tokens())
    reference = copy.deepcopy(task.base)
    for site in task.ffns:
        down = reference.get_submodule(site.tensor_names()["down"])
        (down.weight.data if not site.names.transposed else down.weight.data.T)[:, 3] = 0  # type: ignore[union-attr, index]
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(input_ids=tokens()).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, dense(task, tokens()), atol=1e-3)


def test_only_the_controller_learns() -> None:
    """O7: base weights and their gradients stay untouched."""
    task = tiny_task("qwen2", attention="both", preset="paper", bias=0.0)
    before = {name: tensor.clone() for name, tensor in task.base.state_dict().items()}
    optimiser = torch.optim.AdamW(task.parameter_groups(), lr=0.1)
    for step in range(2):
        loss, _ = task(tokens(), torch.arange(2), step)
        loss.backward()
        optimiser.step()
    assert all(parameter.grad is None for parameter in task.base.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in task.base.state_dict().items())
    without = [name for name, parameter in task.controller.named_parameters() if parameter.grad is None]
    assert without == []


def test_every_decision_gets_a_gradient_from_distillation() -> None:
    task = tiny_task(
        attention="both", preset="paper", bias=0.0, budget_weight=0.0, union_weight=0.0, balance_weight=0.0
    )
    loss, _ = task(tokens(), torch.arange(2), 0)
    loss.backward()
    for head in task.controller.ffn_heads:
        assert head.router.weight.grad is not None
        assert float(head.router.weight.grad.abs().max()) > 0
    for head in task.controller.attention_heads:
        rows = head.decoder.projection.weight.grad
        assert rows is not None
        assert float(rows[: head.values].abs().max()) > 0
        assert float(rows[head.values :].abs().max()) > 0


def test_masks_that_are_off_get_a_gradient_unless_the_reference_is_wanted() -> None:
    gradients = {}
    for reference in (False, True):
        task = tiny_task(preset="reference", reference=reference)
        masks = torch.zeros(4, 37, requires_grad=True)
        route = torch.zeros(2, 12, 4)
        route[..., 1] = 1
        factor = (route @ masks).square() if reference else route @ masks
        with task.masker.on(Fixed(factor)):
            logits = task.base(input_ids=tokens()).logits
        gradients[reference] = torch.autograd.grad(logits.logsumexp(-1).sum(), masks)[0]
    assert float(gradients[False][1].abs().min()) > 0
    assert float(gradients[True].abs().max()) == 0


def test_reference_mode_samples_and_masks_as_the_published_code() -> None:
    task = randomise_controller(tiny_task("llama", attention="both", preset="reference", reference=True, bias=0.0))
    noise = Noise(0, 1, torch.arange(2), task.device)
    gates = SampledGates(task.controller, task.controller(), None, 0.0, noise, task.config)
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    mask_TF = gates.neurons(0, x).flatten(0, 1)
    expert_T = gates.choices[0].flatten(0, 1).argmax(-1)
    first, second = torch.nonzero(expert_T == expert_T.mode().values).flatten()[:2]
    assert not torch.equal(mask_TF[first], mask_TF[second])  # drawn anew for every token

    on_TF = mask_TF.detach() > 0.5
    weight = task.controller.ffn_heads[0].decoder.projection.weight
    off, on = (
        torch.autograd.grad(mask_TF[chosen_TF].sum(), weight, retain_graph=True)[0] for chosen_TF in (~on_TF, on_TF)
    )
    assert float(off.abs().max()) == 0  # masked in both branches: squared
    assert float(on.abs().max()) > 0

    values_TH, output_TH = gates.values(0, x)
    assert values_TH is not None
    assert output_TH is None
    assert not torch.equal(gates.second_sample()[0], gates.masks[0])


def test_one_expert_makes_the_router_irrelevant() -> None:
    """O8."""
    task = randomise_controller(tiny_task(experts=1))
    first = task.run(gates_of(task), tokens())
    for head in task.controller.ffn_heads:
        head.router.weight.data.neg_()
    assert torch.equal(first, task.run(gates_of(task), tokens()))
    assert not torch.allclose(first, dense(task, tokens()), atol=1e-3)


def test_equal_experts_make_routing_irrelevant_and_their_order_is_free() -> None:
    """O9."""
    task = randomise_controller(tiny_task(offset=True))
    gates = gates_of(task, None)
    different = [mask.clone() for mask in gates.masks]
    order = torch.tensor([2, 0, 3, 1])
    first = task.run(gates, tokens())

    permuted = gates_of(task, None)
    permuted.masks = [mask[order] for mask in different]
    for head in task.controller.ffn_heads:
        head.router.weight.data = head.router.weight.data[order]
    torch.testing.assert_close(task.run(permuted, tokens()), first)

    equal = [gates_of(task, step) for step in (None, 1)]
    for gates in equal:
        gates.masks = [mask[:1].expand(4, -1) for mask in different]
    logits = [task.run(gates, tokens()) for gates in equal]
    assert not torch.equal(equal[0].choices[0], equal[1].choices[0])
    assert torch.equal(logits[0], logits[1])


def test_tied_masks_commute_with_rotation_and_untied_ones_do_not() -> None:
    """O10."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 6, D_HEAD, generator=generator)
    angles = torch.rand(1, 6, D_HEAD // 2, generator=generator) * 6
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    pairs = torch.tensor([1.0, 0.0, 1.0, 0.0])
    untied = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 1])
    for mask, commutes in ((torch.cat([pairs, pairs]), True), (untied, False)):
        rotated = apply_rotary_pos_emb(q, k, cos, sin)
        masked = apply_rotary_pos_emb(q * mask, k * mask, cos, sin)
        same = all(torch.allclose(a * mask, b, atol=1e-6) for a, b in zip(rotated, masked, strict=True))
        assert same is commutes


def pruned_reference(family: str, implementation: str, pairs: Tensor, scale: float) -> Tensor:
    """The same by replacing the attention function: it gathers the kept dims of rotated queries and keys."""
    kept = torch.nonzero(torch.cat([pairs, pairs])).flatten()
    own = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS["sdpa"]

    def smaller(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if mask is None and implementation == "eager":  # transformers makes none for a function of another name
            mask = torch.full((query.shape[2], query.shape[2]), -torch.inf).triu(1)
        return own(module, query[..., kept], key[..., kept], value, mask, **{**kwargs, "scaling": scale})

    ALL_ATTENTION_FUNCTIONS.register("smaller_heads", smaller)
    model, _ = tiny_model(family)
    model.config._attn_implementation = "smaller_heads"  # type: ignore[union-attr]
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama_bias"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_pruned_pairs_equal_masked_ones_at_the_original_scale(family: str, implementation: str) -> None:
    """O11: two query heads per key head; qwen2 and llama_bias have biases."""
    pairs = torch.tensor([1.0, 0.0, 1.0, 1.0])
    model, anatomy = tiny_model(family, attn_implementation=implementation)
    masker = Masker(model, list(anatomy.sites), attention_sites(anatomy, range(2), "pairs"))
    with torch.no_grad(), masker.on(Fixed(torch.ones(37), pairs)):
        masked = model(input_ids=tokens()).logits
    same = pruned_reference(family, implementation, pairs, D_HEAD**-0.5)
    torch.testing.assert_close(masked, same, atol=2e-5, rtol=2e-5)
    other = pruned_reference(family, implementation, pairs, 6**-0.5)
    assert not torch.allclose(masked, other, atol=1e-3)


@pytest.mark.parametrize("family", [*PRUNES_PAIRS, "qwen3"])
def test_a_value_dim_that_is_off_needs_neither_its_rows_nor_its_columns(family: str) -> None:
    """O12."""
    model, anatomy = tiny_model(family)
    sites = attention_sites(anatomy, range(2), "values")
    h = sites[0].head_dim
    values = torch.ones(h)
    values[[1, 4]] = 0
    masker = Masker(model, list(anatomy.sites), sites)
    with torch.no_grad(), masker.on(Fixed(torch.ones(37), values=values)):
        masked = model(input_ids=tokens()).logits
        for site in sites:
            v, o = (model.get_submodule(f"{site.path}.{name}_proj") for name in "vo")
            rows = torch.arange(site.key_heads * h) % h
            off = (rows == 1) | (rows == 4)
            v.weight.data[off] = 7.0  # type: ignore[union-attr, operator]
            o.weight.data[:, off.repeat(site.heads // site.key_heads)] = -5.0  # type: ignore[union-attr, operator]
        again = model(input_ids=tokens()).logits
    torch.testing.assert_close(masked, again)


def test_families_whose_attention_cannot_be_masked_are_refused() -> None:
    for family in (name for name in FAMILIES if ATTENTION[name] == "none"):
        with pytest.raises(UnsupportedModelError):
            attention_sites(tiny_model(family)[1], range(2), "both")
    for family in PRUNES_VALUES:
        anatomy = tiny_model(family)[1]
        assert [site.pairs for site in attention_sites(anatomy, range(2), "both")] == [0, 0]
        with pytest.raises(UnsupportedModelError, match="norms queries and keys"):
            attention_sites(anatomy, range(2), "pairs")


@pytest.fixture
def hard() -> tuple[ToMoETask, SampledGates]:
    task = randomise_controller(tiny_task("qwen2", attention="both", preset="paper", bias=0.0))
    return task, gates_of(task, None, 1)


def test_later_tokens_do_not_reach_back(hard: tuple[ToMoETask, SampledGates]) -> None:
    """O13: logits, routes and masks."""
    task, _ = hard
    ids = tokens().clone()
    first = gates_of(task, None)
    before = task.run(first, ids)
    ids[:, 7] = (ids[:, 7] + 11) % 290 + 2
    second = gates_of(task, None)
    after = task.run(second, ids)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
    for place in range(2):
        assert torch.equal(first.choices[place][:, :7], second.choices[place][:, :7])
        assert torch.equal(first.value_masks[place][:, :7], second.value_masks[place][:, :7])


def test_a_row_of_a_batch_is_the_row_alone_and_decoding_is_prefilling(hard: tuple[ToMoETask, SampledGates]) -> None:
    """O13."""
    task, gates = hard
    whole = task.run(gates_of(task, None), tokens())
    alone = task.run(gates, tokens()[1:])
    torch.testing.assert_close(whole[1:], alone, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(alone, dense(task, tokens()[1:]), atol=1e-2)
    with torch.no_grad(), task.masker.on(gates_of(task, None, 1)):
        part = task.base(input_ids=tokens()[1:, :8], use_cache=True)
        steps, cache = [part.logits], part.past_key_values
        for position in range(8, 12):
            out = task.base(input_ids=tokens()[1:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(steps, 1), alone, atol=2e-5, rtol=2e-5)


def test_noise_of_a_sequence_does_not_depend_on_its_batch() -> None:
    task = randomise_controller(tiny_task("llama", attention="both", preset="paper", bias=0.0))
    decoded, shift = task.decode()

    def routes(ids: Tensor, index: list[int]) -> Tensor:
        noise = Noise(0, 5, torch.tensor(index), task.device)
        gates = SampledGates(task.controller, decoded, None, shift, noise, task.config)
        task.run(gates, ids)
        return torch.cat([gates.choices[0], gates.value_masks[0]], dim=-1)

    both = routes(tokens(), [8, 9])
    assert torch.equal(both[1:], routes(tokens()[1:], [9]))
    assert not torch.equal(both[1:], routes(tokens()[1:], [8]))


def test_pairs_that_depend_on_the_token_are_a_study() -> None:
    task = randomise_controller(tiny_task("llama", attention="dynamic", preset="paper", bias=0.0))
    gates = gates_of(task)
    task.run(gates, tokens())
    assert gates.pair_masks[0].shape == (2, 12, 4)
    assert not torch.equal(gates.pair_masks[0][:, 0], gates.pair_masks[0][:, 1])
    loss, _ = task(tokens(), torch.arange(2), 0)
    loss.backward()

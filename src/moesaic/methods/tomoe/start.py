"""Where training may begin instead of noise: experts and routers of a blueprint, or of token clusters [OURS].

Axes: T tokens, D model width, F neurons, N experts; lists run over the masked FFNs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.methods.tomoe.samplers import MEDIAN
from moesaic.methods.tomoe.task import ToMoETask
from moesaic.options.device import exact_device
from moesaic.solvers.router_fit import energy_targets, fit_ridge, top_k_sets
from moesaic.solvers.token_clusters import cluster_tokens, neuron_shares
from moesaic.train.data import derived_seed

_TOKENS = 8192
_ROUNDS = 4  # between which tokens an expert serves and which neurons it has
_RIDGE = 1e-2  # relative to the mean square of an input coordinate
_SPREAD = 2.0  # of a token's router logits around their mean: decided, but not deaf to the noise
_REACH = 3.0  # standard deviations of log energy that a logit may lie from the threshold


@torch.no_grad()
def begin(task: ToMoETask, checkpoint: Checkpoint, ids_NW: Tensor) -> None:
    """Set the offsets and routers of ``task`` as ``task.config.start`` says.

    Args:
        task: Before training.
        checkpoint: Of its dense model.
        ids_NW: Training windows; some of their tokens are used.

    Raises:
        InputError: the blueprint does not fit the model or has another number of experts.
        CheckpointError: there is no blueprint.
    """
    start, config = task.config.start, task.config
    plans = None if start == "clusters" else _plans_of(Path(start).expanduser(), task)
    width = task.budget.neuron_budget(*_expected_attention(task)) / sum(c.neuron * c.neurons for c in task.budget.costs)
    some_NW = ids_NW[: max(1, _TOKENS // ids_NW.shape[1])]
    inputs = ffn_inputs(task, some_NW)
    embeddings = task.controller.hypernetwork()
    here = exact_device(task.device)
    for place, (site, head) in enumerate(zip(task.ffns, task.controller.ffn_heads, strict=True)):
        read_TD = inputs[place].to(here)
        weights = load_ffn(checkpoint, site, task.anatomy.activation).to(read_TD.dtype, here)
        share_TF = neuron_shares(weights.hidden(read_TD), weights.down_DF.float().norm(dim=0))
        x_TD = read_TD.float()
        if plans is None:
            seed = derived_seed(task.seed, place)
            logits_NF, router_ND = token_clusters(x_TD, share_TF, config.experts, width / config.top_k, seed)
        else:
            logits_NF, router_ND = _from_plan(plans[place], x_TD, share_TF)
        wanted_NF = MEDIAN - config.bias + config.start_margin * logits_NF
        assert head.offset_NF is not None
        head.offset_NF.copy_(wanted_NF.to(task.device) - head.decoder(embeddings[2 * place + 1]))
        head.router.weight.copy_(router_ND)
    begin_attention(task, some_NW, embeddings)


def token_clusters(x_TD: Tensor, share_TF: Tensor, experts: int, width: float, seed: int) -> tuple[Tensor, Tensor]:
    """Experts and router of :func:`moesaic.solvers.token_clusters.cluster_tokens`, none of their neurons shared.

    Args:
        x_TD: Inputs of the FFN.
        share_TF: Share of each neuron in each token's energy.
        experts: N.
        width: Share of the neurons that an expert may have.
        seed: Of the clusters.

    Returns:
        Standardised log energy of the neurons on each expert's tokens [N, F], 0 at the expert's threshold; router
        [N, D].
    """
    kept = max(1, round(width * share_TF.shape[1]))
    router_ND = cluster_tokens(x_TD, share_TF, experts, (0, kept), rounds=_ROUNDS, ridge=_RIDGE, seed=seed).router_ED
    sent_TN = top_k_sets(x_TD @ router_ND.T, 1)
    # One average token more, as in the solver: an expert without tokens starts from what all tokens need.
    energy_NF = (sent_TN.T @ share_TF + share_TF.mean(0)) / (sent_TN.sum(0)[:, None] + 1)
    return standardised(energy_NF, kept), scaled_router(router_ND, x_TD)


def standardised(energy_NF: Tensor, kept: int) -> Tensor:
    """Log energies in standard deviations of their row, 0 at the last of the ``kept`` largest."""
    log_NF = energy_NF.clamp(min=1e-12).log()
    threshold_N1 = log_NF.sort(dim=-1, descending=True).values[:, kept - 1 : kept]
    several = log_NF.shape[-1] > 1
    spread_N1 = log_NF.std(dim=-1, correction=int(several), keepdim=True).clamp(min=1e-6)  # of equal energies 0
    return ((log_NF - threshold_N1) / spread_N1).clamp(-_REACH, _REACH)


def scaled_router(weight_ND: Tensor, x_TD: Tensor) -> Tensor:
    """The router with its logits spread as training wants them; decisions stay."""
    logits_TN = x_TD @ weight_ND.T
    spread = float((logits_TN - logits_TN.mean(1, keepdim=True)).std())
    return weight_ND * (_SPREAD / spread) if spread > 0 else weight_ND


def ffn_inputs(task: ToMoETask, ids_BW: Tensor) -> list[Tensor]:
    """What each masked FFN of the dense model reads, [T, D] in its dtype, in host memory."""
    found: list[list[Tensor]] = [[] for _ in task.ffns]

    def remember(place: int) -> object:
        return lambda module, args: found[place].append(args[0].flatten(0, -2))

    handles = [
        task.base.get_submodule(site.path).register_forward_pre_hook(remember(place))  # type: ignore[arg-type]
        for place, site in enumerate(task.ffns)
    ]
    _run_dense(task, ids_BW, handles)
    return [torch.cat(parts).cpu() for parts in found]


def begin_attention(task: ToMoETask, ids_BW: Tensor, embeddings: Tensor) -> None:
    """Start the masks of attention at the pairs and value dims of largest energy, the same for all tokens at first.

    A pair's energy is that of queries times that of keys, a value dim's what it adds to the output projection's result;
    both as shares of each token's, summed over the heads. The decoder's rows are moved along the hidden state of the
    mean embedding, so that they give the wanted logits there.
    """
    if not task.attention:
        return
    config = task.config
    shares = _projection_shares(task, ids_BW)
    for place, (site, head) in enumerate(zip(task.attention, task.controller.attention_heads, strict=True)):
        q_HC, k_HC, v_HC = (
            shares[place, name].unflatten(0, (-1, site.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        group = site.heads // site.key_heads
        energy = [v_HC.repeat_interleave(group, 0) * _column_energies(task, place)] if head.values else []
        if head.pairs:
            q_HP, k_HP = (x_HC[:, : head.pairs] + x_HC[:, head.pairs :] for x_HC in (q_HC, k_HC))
            energy.append(q_HP * k_HP.repeat_interleave(group, 0))
        wanted = [
            standardised(e_HC.sum(0, keepdim=True), max(1, round(config.active * e_HC.shape[1])))[0] for e_HC in energy
        ]
        decoder = head.decoder
        hidden_R = nn.functional.gelu(decoder.norm(embeddings[2 * place].mean(0)))
        missing = MEDIAN - config.bias + config.start_margin * torch.cat(wanted) - decoder.projection(hidden_R)
        decoder.projection.weight += torch.outer(missing, hidden_R / hidden_R.square().sum())


def _column_energies(task: ToMoETask, place: int) -> Tensor:
    """Squared norms of the output projection's columns, [heads, H]."""
    site = task.attention[place]
    weight = task.base.get_submodule(f"{site.path}.o_proj").weight
    assert isinstance(weight, Tensor)
    return weight.float().square().sum(0).unflatten(0, (site.heads, site.head_dim))


def _projection_shares(task: ToMoETask, ids_BW: Tensor) -> dict[tuple[int, str], Tensor]:
    """Mean over tokens of each output coordinate's share in the energy of its projection."""
    sums: dict[tuple[int, str], Tensor] = {}

    def remember(place: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            energy = output.float().square().flatten(0, -2)
            share = (energy / energy.sum(1, keepdim=True).clamp(min=1e-30)).sum(0)
            sums[place, name] = sums.get((place, name), torch.zeros(())) + share

        return hook

    handles = [
        task.base.get_submodule(f"{site.path}.{name}").register_forward_hook(remember(place, name))
        for place, site in enumerate(task.attention)
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    _run_dense(task, ids_BW[: max(1, len(ids_BW) // 4)], handles)
    return sums


def _run_dense(task: ToMoETask, ids_BW: Tensor, handles: Sequence[Any]) -> None:
    """The dense model on each window; then the hooks come off."""
    for ids in ids_BW.split(1):
        task.base(input_ids=ids.to(task.device), use_cache=False)
    for handle in handles:
        handle.remove()


def _from_plan(plan: LayerPlan, x_TD: Tensor, share_TF: Tensor) -> tuple[Tensor, Tensor]:
    held_NF, router = _held(plan).to(x_TD.device), plan.router
    if router.kind == "linear" and not router.normalise_input and "bias" not in router.tensors:
        router_ND = scaled_router(router.tensors["weight"].to(x_TD), x_TD)
    else:  # of another form: what the experts are worth decides
        worth_TN = energy_targets(share_TF @ held_NF.T, "raw")
        router_ND = scaled_router(fit_ridge([(x_TD, worth_TN)], _RIDGE), x_TD)
    return 2 * held_NF - 1, router_ND


def _held(plan: LayerPlan) -> Tensor:
    """Neurons of each expert, shared ones in all, 0/1 [N, F]; all that is always on is one expert."""
    held_NF = torch.zeros(max(1, len(plan.experts)), plan.d_ff)
    for held_F, members in zip(held_NF, plan.experts, strict=False):
        held_F[members[members >= 0].long()] = 1.0
    held_NF[:, plan.shared[plan.shared >= 0]] = 1.0
    return held_NF.amax(0, keepdim=True) if plan.router.kind == "static" else held_NF


def _plans_of(folder: Path, task: ToMoETask) -> Sequence[LayerPlan]:
    sites = Blueprint.load(folder).sites
    missing = [site.path for site in task.ffns if site.path not in sites]
    if missing:
        raise InputError(f"the blueprint in {folder} leaves {missing[0]} dense", "keep the same layers dense")
    plans = [sites[site.path] for site in task.ffns]
    for site, plan in zip(task.ffns, plans, strict=True):
        experts = len(_held(plan))
        if plan.d_ff != site.d_ff or experts != task.config.experts:
            raise InputError(
                f"{site.path} has {experts} experts of {plan.d_ff} neurons in the blueprint in {folder}",
                f"it must have {task.config.experts} of {site.d_ff}: set experts, or take another blueprint",
            )
    return plans


def _expected_attention(task: ToMoETask) -> tuple[list[float] | None, list[float] | None]:
    heads = [task.config.active * cost.head_dim for cost in task.budget.costs]
    return (heads if task.budget.pairs else None), (heads if task.budget.values else None)

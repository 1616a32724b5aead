"""How much each layer matters: what the model loses when one FFN alone keeps its strongest neurons only.

Source: ours [OURS]. Neurons are kept by mean energy share (:func:`moesaic.solvers.token_clusters.neuron_shares`), the
cheapest control; loss is KL(dense || cut) of the next-token distributions, on calibration tokens that did not choose
the neurons. The forward pass is taken up at the layer that is cut: with L layers it costs (L + 1) / 2 of them per cut.

Axes: N windows, W tokens per window, T = N W tokens, D model width, F neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.anatomy.base import Anatomy
from moesaic.calibration.inputs import SiteInputs
from moesaic.calibration.skeleton import Skeleton
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.nn.ffn import FFNWeights
from moesaic.progress import Progress
from moesaic.solvers.token_clusters import largest, neuron_shares

WINDOW = 256
"""Tokens per window here: short ones are cheap, and more places of the text are seen."""


def cut_windows(ids_NW: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Two sets of windows from the calibration text: to choose neurons, from its first half, and to measure, from its
    second; each of at most ``tokens`` tokens, evenly spaced, int64 [N, W].

    Raises InputError when the text is shorter than two windows.
    """
    width = min(WINDOW, ids_NW.shape[1])
    pieces_NW = ids_NW[:, : ids_NW.shape[1] // width * width].reshape(-1, width)
    half = len(pieces_NW) // 2
    if half == 0:
        raise InputError(
            f"{ids_NW.numel()} calibration tokens are too few to tell layers apart", "give at least 512: --calib-tokens"
        )
    count = min(half, max(1, tokens // width))
    picked = torch.arange(count) * half // count
    return pieces_NW[:half][picked], pieces_NW[-half:][picked]


@torch.no_grad()
def measure_layers(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    windows: tuple[Tensor, Tensor],
    fractions: Sequence[float],
    dtype: torch.dtype,
    progress: Progress,
    device: torch.device | None = None,
) -> list[dict[float, float]]:
    """KL divergence in nats per token for every layer of a dense model, by active fraction.

    Holds the last hidden states of every cut: layers x fractions x T x D numbers of ``dtype``.

    Args:
        checkpoint: The dense model.
        anatomy: Of the same model.
        windows: From :func:`cut_windows`.
        fractions: Active fractions at which each layer is cut.
        dtype: In which the model runs.
        progress: Receives layers computed.
        device: Where it runs; None is the CPU.
    """
    chosen_NW, measured_NW = windows
    layers, held_out = anatomy.num_layers, len(chosen_NW)
    progress.start("sensitivity of the layers", len(fractions) * layers * (layers + 1) // 2)
    dense = LayerStream(checkpoint, anatomy, torch.cat(windows), compute_dtype=dtype, device=device)
    branch = LayerStream(checkpoint, anatomy, measured_NW, compute_dtype=dtype, device=device)
    cuts: list[dict[float, Tensor]] = []
    for layer in range(layers):
        (site,) = anatomy.sites_of(layer)
        weights = dense.weights(site.path)
        share_F = _mean_share(weights, dense.capture()[site.path].part(slice(chosen_NW.numel())))
        ends = {}
        for fraction in fractions:
            count = max(1, round(fraction * site.d_ff))
            kept_M = largest(share_F[None], count)[0].nonzero().flatten()
            branch.restore(layer, {"hidden": dense.state()["hidden"][held_out:]})
            branch.advance({site.path: weights.take(kept_M.to(branch.device), keep_down_bias=True)})
            progress.advance(f"layer {layer} at {fraction:.0%}")
            while branch.layer < layers:
                branch.advance()
                progress.advance(f"layer {layer} at {fraction:.0%}")
            ends[fraction] = branch.state()["hidden"].clone()
        cuts.append(ends)
        dense.advance()
    skeleton = Skeleton(checkpoint, anatomy, dtype, dense.device)
    return _divergences(skeleton, measured_NW, dense.state()["hidden"][held_out:], cuts, progress)


def _mean_share(weights: FFNWeights, inputs: SiteInputs) -> Tensor:
    """Mean energy share of every neuron, float32 [F]."""
    weights = weights.to(device=inputs.device)
    norm_F = weights.down_DF.float().norm(dim=0)
    total_F = norm_F.new_zeros(weights.d_ff)
    for x_BD in inputs.batches():
        total_F += neuron_shares(weights.hidden(x_BD), norm_F).sum(dim=0)
    return total_F / inputs.tokens


def _divergences(
    skeleton: Skeleton,
    ids_NW: Tensor,
    dense_NWD: Tensor,
    cuts: Sequence[dict[float, Tensor]],
    progress: Progress,
) -> list[dict[float, float]]:
    """Mean KL divergence of every cut's last hidden states, window by window: the dense logits are made once."""
    skeleton.load_outer()

    def logits(hidden_WD: Tensor, ids_W: Tensor) -> Tensor:
        hidden_1WD = hidden_WD[None].to(skeleton.device)
        skeleton.stand_ins[0].seen = lambda _hidden, _passed: hidden_1WD
        return skeleton.model(input_ids=ids_W[None].to(skeleton.device), use_cache=False).logits[0].float()

    progress.start("sensitivity: comparing outputs", len(ids_NW) * len(cuts))
    total = [dict.fromkeys(ends, 0.0) for ends in cuts]
    for window, ids_W in enumerate(ids_NW):
        dense_WV = logits(dense_NWD[window], ids_W)
        p_WV = dense_WV.softmax(-1)
        own_W = _surprise(p_WV, dense_WV)
        for sums, ends in zip(total, cuts, strict=True):
            for fraction, end_NWD in ends.items():
                divergence_W = _surprise(p_WV, logits(end_NWD[window], ids_W)) - own_W
                sums[fraction] += float(divergence_W.double().mean()) / len(ids_NW)
            progress.advance()
    return total


def _surprise(p_WV: Tensor, logits_WV: Tensor) -> Tensor:
    """Cross-entropy of the logits' distribution against ``p_WV``, nats [W]: few passes over the vocabulary."""
    return logits_WV.logsumexp(-1) - torch.linalg.vecdot(p_WV, logits_WV)

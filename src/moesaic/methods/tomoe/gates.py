"""Gates of training: masks sampled from the controller, once per step and shared by all tokens; routes per token.

All noise is drawn from (seed, step, purpose) or, for what differs by token, (seed, step, purpose, sequence), so that
it does not depend on how a batch is cut up.

Axes: B sequences, W tokens of one, D model width, L layers, N experts, F neurons, H dims of a head, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.controller import Controller, Decoded
from moesaic.methods.tomoe.samplers import MEDIAN, capped_mask, gumbel, sample_mask, sample_route
from moesaic.train.noise import generator

_NEURONS, _PAIRS, _ROUTES, _VALUES, _DYNAMIC, _SECOND = range(6)


class Noise:
    """Gumbel noise of one micro-batch; all None when switched off.

    Args:
        seed: Of the run.
        step: Of training; None switches the noise off.
        index_B: Numbers of the sequences.
        device: Where the noise is wanted.
    """

    def __init__(self, seed: int, step: int | None, index_B: Tensor, device: torch.device) -> None:
        self._seed, self._step, self._device = seed, step, device
        self._index = index_B.tolist()

    def shared(self, purpose: int, place: int, shape: tuple[int, ...]) -> Tensor | None:
        """The same for all sequences."""
        if self._step is None:
            return None
        return gumbel(shape, generator(self._seed, self._step, purpose, place), self._device)

    def tokens(self, purpose: int, place: int, like: Tensor) -> Tensor | None:
        """One draw per sequence for a tensor [B, W, ...] (or those axes flattened)."""
        if self._step is None:
            return None
        shape = (like.numel() // len(self._index) // like.shape[-1], like.shape[-1])
        draws = [gumbel(shape, generator(self._seed, self._step, purpose, place, i)) for i in self._index]
        return torch.stack(draws).view(like.shape).to(self._device)


class SampledGates:
    """What one training step masks and routes; :class:`moesaic.methods.tomoe.masking.Gates`.

    Args:
        controller: Heads and hypernetwork.
        decoded: Its logits.
        masks: FFN masks [N, F] per layer to use; sampled here when None.
        shift: Bias b of the static logits.
        noise: Of this micro-batch.
        config: ToMoE's options.
        cap: Most value dims of a token when attention is masked as exported: what is on more often than off, at least
            one. None samples.

    Attributes:
        masks: FFN masks [N, F] per layer.
        choices: Hard routes [..., N] per layer, in order of the layers.
        soft: Their relaxations.
        value_masks: Masks of the value dims [..., H] per layer that has them.
        pair_masks: Masks of the pairs, [P] or [..., P].
    """

    def __init__(
        self,
        controller: Controller,
        decoded: Decoded,
        masks: list[Tensor] | None,
        shift: float,
        noise: Noise,
        config: Config,
        cap: int | None = None,
    ) -> None:
        self._controller, self._decoded, self._config = controller, decoded, config
        self._shift, self._noise, self._cap = shift, noise, cap
        self.masks = masks if masks is not None else self._sample_masks(_NEURONS)
        self.pair_masks: dict[int, Tensor] = {
            place: self._attend(logits_P, noise.shared(_PAIRS, place, tuple(logits_P.shape)), shift, logits_P.numel())
            for place, logits_P in enumerate(decoded.pairs)
            if logits_P is not None
        }
        self.value_masks: dict[int, Tensor] = {}
        self.choices: list[Tensor] = []
        self.soft: list[Tensor] = []

    def second_sample(self) -> list[Tensor]:
        """FFN masks drawn once more, as the reference does for its regularisers."""
        return self._sample_masks(_SECOND)

    def neurons(self, place: int, x: Tensor) -> Tensor:
        """See :class:`Gates`; routes the tokens on the way."""
        with torch.autocast(x.device.type, enabled=False):
            logits_TN = self._controller.ffn_heads[place].router(x.float())
            noise_TN = self._noise.tokens(_ROUTES, place, logits_TN)
            choice_TN, soft_TN = sample_route(logits_TN, noise_TN, self._config.temperature, self._config.top_k)
        self.choices.append(choice_TN)
        self.soft.append(soft_TN)
        if self._config.reference:
            return self._token_masks(place, choice_TN)
        weight_TN = choice_TN / self._config.top_k
        # The route in the dtype of x: ones, zeros and their sums over experts are exact there.
        return weight_TN.to(x.dtype) @ self.masks[place].to(x.dtype)

    def pairs(self, place: int, x: Tensor) -> Tensor | None:
        """See :class:`Gates`; both dims of a pair share its mask."""
        head = self._controller.attention_heads[place]
        if self._controller.dynamic_pairs and head.pairs and place not in self.pair_masks:
            with torch.autocast(x.device.type, enabled=False):
                logits_TP = head.dynamic_pair_logits(self._decoded.embeddings[2 * place], x.float())
                noise_TP = self._noise.tokens(_DYNAMIC, place, logits_TP)
                self.pair_masks[place] = self._attend(logits_TP, noise_TP, self._config.bias, head.pairs)
        mask = self.pair_masks.get(place)
        return None if mask is None else torch.cat([mask, mask], dim=-1)

    def values(self, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See :class:`Gates`."""
        head = self._controller.attention_heads[place]
        if not head.values:
            return None, None
        with torch.autocast(x.device.type, enabled=False):
            logits_TH = head.value_logits(self._decoded.embeddings[2 * place], x.float())
            noise_TH = self._noise.tokens(_VALUES, place, logits_TH)
            mask_TH = self._attend(logits_TH, noise_TH, self._config.bias, self._cap)
        self.value_masks[place] = mask_TH
        return mask_TH, None if self._config.reference else mask_TH

    def _attend(self, logits: Tensor, noise: Tensor | None, shift: float, cap: int | None) -> Tensor:
        """A mask of attention: sampled, or as exported with at most ``cap`` on."""
        if self._cap is None or cap is None:
            return self._mask(logits, noise, shift)
        return capped_mask(logits, MEDIAN - shift, cap)

    def _mask(self, logits: Tensor, noise: Tensor | None, shift: float) -> Tensor:
        return sample_mask(logits, noise, shift, self._config.temperature)

    def _sample_masks(self, purpose: int) -> list[Tensor]:
        return [
            self._mask(logits_NF, self._noise.shared(purpose, place, tuple(logits_NF.shape)), self._shift)
            for place, logits_NF in enumerate(self._decoded.neurons)
        ]

    def _token_masks(self, place: int, choice_TN: Tensor) -> Tensor:
        """The reference's: decode the chosen embedding per token, noise per token; squared, as it masks both branches:
        the same values, twice the gradient where on and none where off."""
        head = self._controller.ffn_heads[place]
        logits_TF = head.decoder(choice_TN @ self._decoded.embeddings[2 * place + 1])
        mask_TF = self._mask(logits_TF, self._noise.tokens(_NEURONS, place, logits_TF), self._shift)
        return mask_TF.square()


def load(choices: Tensor) -> Tensor:
    """Share of all choices that fall on each expert, [N]; sums to 1."""
    return F.normalize(choices.detach().flatten(0, -2).sum(0), p=1, dim=0)

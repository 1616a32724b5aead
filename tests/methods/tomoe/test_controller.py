from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moesaic.methods.tomoe.attention import AttentionSite
from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.controller import Controller
from moesaic.methods.tomoe.hypernetwork import Hypernetwork


def test_embeddings_per_submodule_and_expert() -> None:
    """O4."""
    net = Hypernetwork(10, 8)
    assert net().shape == (10, 8, 128)
    assert sum(parameter.numel() for parameter in net.gru.parameters()) == 37_632


@pytest.mark.parametrize("trained", [True, False])
def test_the_input_is_trained_only_when_asked(trained: bool) -> None:
    net = Hypernetwork(4, 3, 16, train_noise=trained)
    assert ("z_QNZ" in dict(net.named_parameters())) is trained
    assert "z_QNZ" in net.state_dict()


def test_experts_differ_by_their_input_alone() -> None:
    """O4: permuted inputs permute the embeddings; equal ones give equal experts."""
    net = Hypernetwork(6, 5, 32)
    before = net()
    order = torch.tensor([3, 1, 4, 0, 2])
    net.z_QNZ.copy_(net.z_QNZ[:, order])
    torch.testing.assert_close(net(), before[:, order])
    net.z_QNZ[:, 1] = net.z_QNZ[:, 0]
    after = net()
    torch.testing.assert_close(after[:, 1], after[:, 0])


def test_depth_is_the_sequence() -> None:
    net = Hypernetwork(6, 2, 16)
    before = net()
    net.z_QNZ[5] += 1
    assert not torch.allclose(net()[0], before[0])


@dataclass
class Model:
    """Sizes of a published model."""

    d: int
    layers: int
    heads: int
    key_heads: int
    h: int
    f: int


MODELS = {
    "llama-2-7b": (Model(4096, 32, 32, 32, 128, 11008), 63_771_392, 18_362_368),
    "llama-2-13b": (Model(5120, 40, 40, 40, 128, 13824), 99_693_312, 28_523_520),
    "llama-3-8b": (Model(4096, 32, 32, 8, 128, 14336), 77_402_880, 18_362_368),
    "qwen-2.5-7b": (Model(3584, 28, 28, 4, 128, 18944), 82_297_600, 14_117_376),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_of_published_models(name: str) -> None:
    """O5: what is trained (Z included, as in the reference), and what is deployed."""
    model, trainable, deployed = MODELS[name]
    config = Config(preset="reference", attention="both")
    sites = [AttentionSite("", model.heads, model.key_heads, model.h, model.h // 2)] * model.layers
    with torch.device("meta"):
        controller = Controller(config, model.d, [model.f] * model.layers, sites)
    assert sum(p.numel() for p in controller.parameters()) == trainable
    kept = sum(head.router.weight.numel() for head in controller.ffn_heads)
    for head in controller.attention_heads:
        assert head.encoder is not None
        norm = head.decoder.norm
        rows = head.decoder.projection.weight[: head.values]
        kept += sum(t.numel() for t in (head.encoder.weight, rows, norm.weight, norm.bias)) + config.embedding
    assert kept == deployed


def test_rates_of_the_parameter_groups() -> None:
    config = Config.model_validate({"experts": 2, "embedding": 16, "router_rate": 0.3, "offset_rate": 0.2})
    controller = Controller(config, 8, [5, 5])
    rate_of = {id(p): group["lr"] for group in controller.groups(config) for p in group["params"]}
    assert len(rate_of) == len(list(controller.parameters()))
    for head in controller.ffn_heads:
        assert rate_of[id(head.router.weight)] == 0.3
        assert rate_of[id(head.offset_NF)] == 0.2
        assert rate_of[id(head.decoder.projection.weight)] == config.train.learning_rate


def test_random_masks_train_the_routers_alone() -> None:
    controller = Controller(Config(masks="random", experts=3, embedding=16), 8, [5, 5])
    trained = {name for name, p in controller.named_parameters() if p.requires_grad}
    assert trained == {"ffn.0.router.weight", "ffn.1.router.weight"}
    logits = controller().neurons
    assert float(torch.stack(logits).std()) > 0.3

"""Code World Model: Llama's layout, no biases in attention, sliding windows in most layers."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(model_type="cwm", attention=Attention(head_dim=128), ffn_bias="mlp_bias")

"""Nemotron 3, 4 and Minitron: ungated, squared ReLU, norms that take off the mean, half of each head rotated."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(model_type="nemotron", names=FFNNames(up="up_proj", down="down_proj"), ffn_bias="mlp_bias")

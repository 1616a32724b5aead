"""OPT: ungated, ReLU, biases. There is no FFN module: ``fc1`` takes over, its siblings become the identity."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(
    model_type="opt",
    layers="model.decoder.layers",
    ffn="fc1",
    names=FFNNames(up="", down="../fc2"),
    bypass=("activation_fn", "fc2"),
    d_ff="ffn_dim",
    activation="activation_function",
)

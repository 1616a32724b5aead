"""From a GGUF file to what its dequantised checkpoint will be, told from the header: nothing large is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.gguf_input.architectures import ARCHITECTURES, Config, architecture_of, model_config
from moesaic.gguf_input.header import Header, read_header
from moesaic.gguf_input.kinds import check_kind
from moesaic.gguf_input.tensors import Made, common_dtype, made_tensors
from moesaic.gguf_input.values import check_types


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF that can be dequantised without a loss.

    Attributes:
        header: What the file says.
        config: config.json of the checkpoint.
        tensors: What it will hold, in order.
        dtype: torch's name of the dtype of all of them.
    """

    header: Header
    config: Config
    tensors: list[Made]
    dtype: str

    @property
    def element(self) -> int:
        """Bytes of one value in the checkpoint."""
        return 4 if self.dtype == "float32" else 2

    @property
    def nbytes(self) -> int:
        """Size of the checkpoint's tensors."""
        return self.element * sum(tensor.count for tensor in self.tensors)


def read_model(file: Path) -> GGUFModel:
    """Read the header of ``file`` (and of its other parts) and account for every key and tensor.

    Raises:
        InputError: no model, missing parts, or the package ``gguf`` is missing.
        UnsupportedModelError: something that a checkpoint cannot hold, named.
        CheckpointError: the file is damaged.
    """
    header = read_header(file)
    check_kind(header, ARCHITECTURES)
    architecture = architecture_of(header)
    config = model_config(header, architecture)
    tensors = made_tensors(header, architecture, config)
    check_types(header.tensors)
    dtype = common_dtype(tensors)
    return GGUFModel(header, config | {"dtype": dtype}, tensors, dtype)

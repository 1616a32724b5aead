"""Whether the output head of a checkpoint is its embedding matrix, by the weights and not by the flag alone.

A merged adapter can leave ``tie_word_embeddings: true`` beside a head of its own. transformers compares the two and
unties them where they differ. Other engines believe the flag and drop the head. So everything that is written states
what the weights say.

Axes: V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.checkpoint.reader import Checkpoint

FLAG = "tie_word_embeddings"
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_ROWS = 8192  # compared at a time: bounds the copies


def stores_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint stores a head beside an embedding matrix of other values. Reads both, if there are two."""
    head = next((name for name in _HEADS if name in checkpoint), None)
    embedding = next((name for name in checkpoint.names if name.endswith(_EMBEDDINGS)), None)
    if head is None or embedding is None:
        return False
    if checkpoint.info(head).shape != checkpoint.info(embedding).shape:
        return True
    pairs = zip(checkpoint.tensor(head).split(_ROWS), checkpoint.tensor(embedding).split(_ROWS), strict=True)
    return any(not bool((head_VD.float() == embedding_VD.float()).all()) for head_VD, embedding_VD in pairs)


def repeated_head(checkpoint: Checkpoint) -> str | None:
    """The name of a stored head that is the embedding matrix once more, which transformers ties; None: there is none.

    Reads both where the config ties them and the file has both.
    """
    head = next((name for name in _HEADS if name in checkpoint), None)
    return None if head is None or not _tied(checkpoint.config) or stores_own_head(checkpoint) else head


def with_true_tie(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """``config`` with its flag off where ``checkpoint`` stores a head of its own; else as it is.

    Args:
        config: A config.json that ties the head or not, that of the ``moesaic`` architecture included.
        checkpoint: The weights that it goes with.
    """
    inner = config.get("text_config")
    stated = [part for part in (config, inner) if isinstance(part, Mapping)]
    if not any(_tied(part) for part in stated) or not stores_own_head(checkpoint):
        return dict(config)
    changed = {**config, FLAG: False}
    return changed | {"text_config": {**inner, FLAG: False}} if isinstance(inner, Mapping) else changed


def _tied(config: Mapping[str, Any]) -> bool:
    """What transformers makes of the flag; absent, it has the default of the family."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if FLAG in config or model_type not in CONFIG_MAPPING:
        return bool(config.get(FLAG))
    return bool(getattr(CONFIG_MAPPING[model_type](), FLAG, False))

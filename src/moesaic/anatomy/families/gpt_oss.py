"""gpt-oss: already a MoE, every layer sparse. Experts have biases and clamp their neurons; on disk they are stacked."""

from moesaic.anatomy.base import Config, Family, FFNNames, MoENames


def _activation(config: Config) -> str:
    return f"clamped({float(config.get('swiglu_alpha', 1.702))!r},{float(config.get('swiglu_limit', 7.0))!r})"


FAMILY = Family(
    model_type="gpt_oss",
    activation=None,
    activation_of=_activation,
    moe=MoENames(
        "num_local_experts",
        "intermediate_size",
        names=FFNNames(
            up="experts.gate_up_proj",
            down="experts.down_proj",
            fused=True,
            interleaved=True,
            transposed=True,
            stacked=True,
            suffixes=("", "_bias"),
        ),
    ),
)

"""Model types that are no family of ours, by the reason. docs/families.md is made from it, refusals read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DECODERS = "moesaic converts decoder-only transformers"
FAMILIES_PAGE = "docs/families.md lists the families that can be converted"
HOW_TO_ADD = (
    "add it as CONTRIBUTING.md shows, or ask for it in the project's issue tracker and quote its config.json;"
    " docs/families.md lists all"
)


@dataclass(frozen=True)
class Kind:
    """Model types that are refused for one reason.

    Attributes:
        reason: Goes on after the name of the model type.
        hint: What to do instead.
        status: ``possible`` where nothing but a description is missing.
        model_types: As in config.json.
    """

    reason: str
    hint: str
    status: Literal["refused", "possible"]
    model_types: frozenset[str]


def _kind(
    reason: str, model_types: str, hint: str = DECODERS, status: Literal["refused", "possible"] = "refused"
) -> Kind:
    return Kind(reason, hint, status, frozenset(model_types.split()))


KINDS: tuple[Kind, ...] = (
    _kind(
        "is a dense decoder that nobody has described yet",
        "apertus1p5_text bert-generation biogpt bloom codegen cohere_compass_text cpmant ctrl doge exaone"
        " gemma4_unified_text gpt-sw3 gpt_bigcode gpt_neo gpt_neox_japanese granite_swa internlm3 iquestcoder jais2"
        " lfm3 modernbert-decoder mpt nanochat olmo_hybrid openai-gpt persimmon xglm",
        HOW_TO_ADD,
        "possible",
    ),
    _kind(
        "is a Mixture of Experts that nobody has described yet",
        "aria_text axk1 axk2 beam dbrx deepseek_v32 dots3_note_text flint inkling2_loop_text inkling2_text inkling_text"
        " kolibri1 minimax_m3_vl_text qwen3_5_moe_text sarvam_mla",
        HOW_TO_ADD,
        "possible",
    ),
    _kind(
        "is a Mixture of Experts with other tensors that transformers joins or splits when it loads them",
        "bailing_hybrid kimi_linear lara_mini qwen4_exp_text sarvam_moe",
        FAMILIES_PAGE,
    ),
    _kind(
        "is a Mixture of Experts whose layers hand on more than hidden states",
        "deepseek_v4 glm_moe_dsa hy_v4 zaya",
        FAMILIES_PAGE,
    ),
    _kind("is a Mixture of Experts whose attention has experts too", "jetmoe", FAMILIES_PAGE),
    _kind("is a Mixture of Experts, of which some are the identity", "longcat_flash", FAMILIES_PAGE),
    _kind(
        "is a Mixture of Experts that weighs what its experts read, and not what they give",
        "llama4_text",
        FAMILIES_PAGE,
    ),
    _kind(
        "is a dense decoder with a norm inside its FFN, over all neurons, so that they cannot be computed apart",
        "bitnet dory",
        FAMILIES_PAGE,
    ),
    _kind(
        "is a dense decoder that gives each layer an embedding of its own and keeps the largest neurons only",
        "gemma3n_text",
        FAMILIES_PAGE,
    ),
    _kind(
        "is a dense decoder that runs its layers several times, which calibration layer by layer does not",
        "hrm_text",
        FAMILIES_PAGE,
    ),
    _kind("reads bytes with several transformers", "blt"),
    _kind("generates speech or music", "moshi musicgen musicgen_melody"),
    _kind("reads text off images", "git trocr"),
    _kind("drafts tokens for another model", "gemma4_assistant"),
    _kind("is no autoregressive decoder of the common form", "reformer xlnet"),
    _kind(
        "is an encoder without a language-model head",
        "albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm"
        " eurobert flaubert fnet funnel gte ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet"
        " mra nomic_bert nystromformer rembert roberta roberta-prelayernorm roc_bert roformer squeezebert xlm"
        " xlm-roberta xlm-roberta-xl xmod yoso",
    ),
    _kind(
        "is an encoder-decoder",
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp"
        " nllb-moe pegasus pegasus_x plbart prophetnet seamless_m4t speech_to_text switch_transformers t5 t5gemma udop"
        " umt5 whisper",
    ),
    _kind("is a state-space or recurrent model", "falcon_mamba mamba mamba2 rwkv xlstm"),
    _kind("is a hybrid whose layers are each a mixer or an FFN alone", "nemotron_h", FAMILIES_PAGE),
    _kind("is a hybrid whose layers share FFNs", "zamba zamba2", FAMILIES_PAGE),
)


def kind_of(model_type: str) -> Kind | None:
    """Why a model type is no family; None where nothing is known of it."""
    return next((kind for kind in KINDS if model_type in kind.model_types), None)

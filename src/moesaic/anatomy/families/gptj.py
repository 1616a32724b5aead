"""GPT-J: ungated, tanh GELU, biases in the FFN, attention and FFN in parallel on one norm. Its config is GPT-2's."""

from dataclasses import replace

from moesaic.anatomy.base import FFNNames
from moesaic.anatomy.families import gpt2

FAMILY = replace(gpt2.FAMILY, model_type="gptj", names=FFNNames(up="fc_in", down="fc_out"))

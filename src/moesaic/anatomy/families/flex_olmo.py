"""FlexOLMo: OLMoE's experts, with norms after attention and FFN."""

from dataclasses import replace

from moesaic.anatomy.families import olmoe

FAMILY = replace(olmoe.FAMILY, model_type="flex_olmo", norms="after")

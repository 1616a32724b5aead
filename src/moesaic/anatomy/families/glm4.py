"""GLM-4-0414 and GLM-Z1: as GLM-4, with norms before and after attention and FFN."""

from dataclasses import replace

from moesaic.anatomy.families import glm

FAMILY = replace(glm.FAMILY, model_type="glm4", norms="both", beyond_stock="norms on both sides of the FFN")

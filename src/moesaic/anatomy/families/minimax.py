"""MiniMax-Text-01 and M1: Mixtral's experts; residuals are weighted, most layers have linear attention."""

from dataclasses import replace

from moesaic.anatomy.families import mixtral

FAMILY = replace(mixtral.FAMILY, model_type="minimax")

"""MiniMax M2: Mixtral's experts with sigmoid routing and a bias on the choice."""

from dataclasses import replace

from moesaic.anatomy.families import mixtral

FAMILY = replace(mixtral.FAMILY, model_type="minimax_m2")

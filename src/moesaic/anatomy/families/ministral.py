"""Ministral 8B: as Mistral, with full attention in some layers."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(model_type="ministral", attention=Attention())

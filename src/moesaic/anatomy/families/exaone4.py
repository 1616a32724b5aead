"""EXAONE 4: gated, SiLU, norms after attention and FFN and on each head; layers without window have no RoPE."""

from moesaic.anatomy.base import Family

FAMILY = Family(
    model_type="exaone4",
    norms="after",
    beyond_stock="norms on each head's queries and keys together with norms after the FFN",
)

"""What options of the solvers may be. No torch here."""

from typing import Literal

AllocationMode = Literal["leading", "any", "widths"]
"""How free an allocation over layers is: which layers may stay dense, or layers of any width."""

MIN_RIDGE = 1e-5
"""Smallest relative ridge: products are summed in fp32, and with fewer tokens than unknowns a matrix that is hardly
shifted has no Cholesky factor in it (100 tokens, 400 unknowns: 1e-6 solves, 1e-7 does not)."""

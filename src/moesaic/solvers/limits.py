"""Limits of the solvers that options must keep. No torch here."""

MIN_RIDGE = 1e-5
"""Smallest relative ridge: products are summed in fp32, and with fewer tokens than unknowns a matrix that is hardly
shifted has no Cholesky factor in it (100 tokens, 400 unknowns: 1e-6 solves, 1e-7 does not)."""

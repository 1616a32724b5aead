"""ToMoE: experts as overlapping masks over a frozen dense model, learned with their routers (arXiv 2501.15316)."""

"""What changes a decided plan: other routers, another budget, where the sparsity goes."""

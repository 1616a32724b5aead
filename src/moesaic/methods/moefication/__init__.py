"""MoEfication."""

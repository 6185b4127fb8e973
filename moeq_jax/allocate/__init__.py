"""Allocation: which unit gets how many bits.

`constraints` says which cells of a plan share one width, `problem` turns cost tables and budgets into knapsack
instances and plans, `knapsack` solves them exactly over the whole model, `tiers` holds the paper's per-layer rules,
`budget` turns bytes into bits.
"""

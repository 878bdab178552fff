"""Other bits for some layers: `--preset` by the kind of layer, `--target-bits` by a measurement and a knapsack
problem.
"""

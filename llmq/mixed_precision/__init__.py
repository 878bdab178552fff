"""`--target-bits`: the error of each layer on each grid, a knapsack problem over these, and the resulting overrides."""

"""`--target-bits`: what each layer costs on each grid, a knapsack over that, and the overrides that follow."""

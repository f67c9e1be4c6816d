"""DejaVu's predictors (arXiv 2310.17157): labels, one run for all layers, capacities."""

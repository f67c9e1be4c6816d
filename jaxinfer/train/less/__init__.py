"""LESS: the data, the objective and the training of its feature maps (arXiv 2402.09398)."""

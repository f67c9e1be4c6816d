"""JoMA: the joint training dynamics of MLP and attention (arXiv 2310.00535)."""

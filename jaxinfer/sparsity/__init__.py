"""Contextual and learned sparsity: what selects, and the blocks that compute the selected part."""

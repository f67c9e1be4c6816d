"""Trains a model to be efficient: which blocks of neurons a token needs, and the model itself, so
that few are needed (LTE, arXiv 2402.06126).

The neurons are grouped into blocks of one size, and every feed-forward block gets a linear router.
In stage 1 routers and model learn together: the task's loss, plus eta times the mean squared score,
by which blocks compete, plus lambda times a term that keeps scores away from the threshold. In
stage 2 the routers stay and the model adapts to what they select.

What the paper leaves open (the start of the routers, how the second term is kept finite) is a field
of `LteRecipe`; its presets are the paper's recipe to the letter, the one that works best in our
runs (gates that are hard in the forward pass), and what either is compared with: the dense model
and random routers, trained equally long by the same code.
"""

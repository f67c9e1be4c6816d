"""Trains a draft for speculative decoding: a small model that guesses what a target will say.

It is distilled: the loss is the divergence of its next-token distribution from the target's, on
texts and on the target's own text, since that is what it will have to continue. What speculation
gains from is the overlap sum(min(p, q)), the probability that a first guess is accepted (arXiv
2402.12374, section 3.2), which is logged.

Three kinds. A model of its own width has an embedding of its own. Where the vocabulary would
outweigh everything else, the target's own embedding and its head's rows of the most frequent tokens
are kept and what is trained is between them: some of the target's layers, or a recurrent cell that
goes on from the target's last state (`jaxinfer.models.recurrent`).
"""

"""JoMA: the joint training dynamics of MLP and attention (arXiv 2310.00535).

`solve` integrates the flows, `closed_forms` says where they go, `train_layer` trains one layer and
`check` holds it against what its gradient flow conserves. `latent_tree` and `grammar` make data
with a hidden structure, of which `learn_hierarchy` says how much a decoder learns.
"""

from jaxinfer.theory.joma import closed_forms
from jaxinfer.theory.joma.contexts import Contexts, multinomial_contexts, overlapping_contexts
from jaxinfer.theory.joma.discrete import Map, salience_map
from jaxinfer.theory.joma.dynamics import Trajectory, solve
from jaxinfer.theory.joma.grammar import Grammar, grammar
from jaxinfer.theory.joma.hierarchy import Hierarchy, learn_hierarchy
from jaxinfer.theory.joma.invariants import Invariants, Sides, check
from jaxinfer.theory.joma.layer import Layer
from jaxinfer.theory.joma.trainer import Records, Training, train_layer
from jaxinfer.theory.joma.trees import LatentTree, latent_tree

__all__ = [
    "Contexts",
    "Grammar",
    "Hierarchy",
    "Invariants",
    "LatentTree",
    "Layer",
    "Map",
    "Records",
    "Sides",
    "Training",
    "Trajectory",
    "check",
    "closed_forms",
    "grammar",
    "latent_tree",
    "learn_hierarchy",
    "multinomial_contexts",
    "overlapping_contexts",
    "salience_map",
    "solve",
    "train_layer",
]

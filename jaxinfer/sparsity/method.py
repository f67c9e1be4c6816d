"""`Sparsity`: a method that makes a model's blocks sparse, with what it has learned."""

from dataclasses import dataclass

from jaxinfer.config import ModelConfig
from jaxinfer.typing import Json, Params


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What `lm.sparsified` and `sparsity=` take: the base class of methods.

    A model keeps its sparse forms by the `==` of their methods, so a subclass compares by what it
    would do; one that holds arrays is declared with eq=False, or leaves them out of the comparison.
    """

    name: str

    def apply(self, cfg: ModelConfig, params: Params) -> Params:
        """The parameters with sparse blocks in place of dense ones; whatever is not replaced is
        shared with `params`, which stay as they are.

        Raises:
          ValueError: the method is for another model.
        """
        raise NotImplementedError

    def describe(self) -> Json:
        """What tells the method from others, for JSON: "name" first, then its arguments and which
        artefact it applies. A saved session holds it."""
        return {"name": self.name}

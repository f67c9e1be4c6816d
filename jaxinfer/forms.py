"""`Forms`: a model and the other forms in which the same model runs."""

import weakref
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxinfer.decode.model import Model
from jaxinfer.models.offload import in_host_memory
from jaxinfer.names import SparsityLike, sparsity_of

Own = TypeVar("Own", bound="Forms")


@dataclass(eq=False)
class Forms(Model):
    """A model that makes its other forms: with sparse blocks, or with layers in host memory.

    The forms share what they do not replace, and compiled programs where shapes allow.
    """

    def __post_init__(self):
        super().__post_init__()
        self._sparse: weakref.WeakSet[Forms] = weakref.WeakSet()  # all forms that are in use
        self._last: Forms | None = None  # the one that was asked for last

    def sparsified(self: Own, sparsity: SparsityLike) -> Own:
        """The same model with the blocks that a method made sparse.

        The form that was asked for last is kept beside the dense model, for the next call with the
        same method. To hold the blocks once, keep the form and drop the dense model.

        Args:
          sparsity: `ji.deja_vu(...)`, `ji.lte(...)`, another method, its name, or a mapping with
            "name" and arguments; None is the model as it is.

        Raises:
          ValueError: there is no such method, it is for another model, or this model is sparse by
            another one already.
        """
        wanted = sparsity_of(sparsity, self.name)
        if wanted is None or wanted == self.sparsity:
            return self
        if self.sparsity is not None:
            raise ValueError(
                f"this model is sparse by {self.sparsity.name!r} already; give {wanted.name!r} to "
                "the dense model"
            )
        form = next((form for form in self._sparse if form.sparsity == wanted), None)
        if form is None:
            self._last = None  # frees its blocks before there are others
            params = wanted.apply(self.config, self.params)
            form = replace(self, params=params, sparsity=wanted)
            form.engine = replace(self.engine, params=params)
            self._sparse.add(form)
        self._last = form
        return form  # type: ignore[return-value]

    def has_form(self, model: Model) -> bool:
        """Whether `model` is a sparse form of this one, or this one itself."""
        return model is self or model in self._sparse

    def offloaded(self: Own, stay: int = 0) -> Own:
        """The same model with its layers, but the first `stay`, in host memory, from where every
        step fetches them: for models that the device cannot hold. Put a draft in front of it.

        Layers move whole, so that sparse blocks (make them first) save no part of the way."""
        return replace(self, params=in_host_memory(self.params, stay))

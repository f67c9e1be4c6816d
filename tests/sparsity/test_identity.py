"""What was measured or saved with one sparse form of a model does not hold for another."""

import pytest

from jaxinfer.lm import LM
from jaxinfer.models.fingerprint import fingerprint, identity
from jaxinfer.names import sparsity_of
from tests.factories import CONFIGS, params_of


@pytest.mark.parametrize("method", ["oracle", "random"])
def test_sparse_forms_have_identities_of_their_own(method):
    lm = LM(CONFIGS["llama"], params_of("llama"))
    forms = [lm, *(lm.sparsified(_method(method, density)) for density in (0.25, 0.5))]
    assert len({identity(one.config, one.params) for one in forms}) == 3
    assert len({fingerprint(one.params) for one in forms}) == 1
    again = LM(CONFIGS["llama"], params_of("llama")).sparsified(_method(method, 0.5))
    assert identity(again.config, again.params) == identity(forms[2].config, forms[2].params)


def _method(name: str, density: float):
    found = sparsity_of({"name": name, "density": density})
    assert found is not None
    return found

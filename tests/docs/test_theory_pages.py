"""The pages of the theory say what a reader must know before using it: joma.md 10.10 and
r_rho_transport.md 12.10."""

import pytest

from tests.docs.markdown import ROOT, prose

JOMA = {
    "exact identities": "Exact for linear and exp attention",
    "the sum rule": "only the sum over queries is conserved",
    "scale": "right direction and the wrong scale",
    "inflated baseline": "An untrained network scores high already",
    "counterexample": "rebound of entropy with an identity activation too",
    "theorem wording": "were not held against the text of the paper",
}
R_RHO = {
    "floor": "stay apart in 8 dimensions and more, whatever their size",
    "growth": "grows like n^((rho-1)/rho) at a fixed error",
    "no code": "which has neither experiments nor code",
    "own solver": "The alternating norm-Newton solver",
    "use": "R_rho promises nothing here that the others do not",
}
STATED = [("docs/methods/joma.md", *one) for one in JOMA.items()]
STATED += [("jaxinfer/theory/README.md", *one) for one in R_RHO.items()]


@pytest.mark.parametrize(("page", "what", "words"), STATED)
def test_a_page_states_its_caveats(page, what, words):
    assert words in " ".join(prose(ROOT / page).split()), what

"""What the tests of damaged files share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch):
    """Values of wrong types reach the code as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

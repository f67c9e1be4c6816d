"""Every routine from end to end with the quick preset; what the numbers are is not looked at."""

import pytest

from bench.models import TINY
from bench.options import Options
from bench.report import headline
from bench.routines import ROUTINES, run


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTINES)
def test_routine_produces_records(name):
    model = "tiny-llama" if name == "serving" else TINY  # whose clients send text
    records = run(name, Options(model=model, preset="quick"))
    assert records and all(r.name == name and r.env["device"] for r in records)
    assert all(headline(r) for r in records)

import pytest

from tests.serve.serving import model, serving


@pytest.fixture(scope="session")
def lm():
    return model()


@pytest.fixture(scope="session")
def batcher(lm):
    with lm.batcher(slots=2, context=448, queue=8, chunk=32, prefix_bytes=2**22) as made:
        yield made


@pytest.fixture(scope="session")
def server(batcher):
    with serving(batcher) as made:
        yield made


@pytest.fixture(scope="session")
def client(server):
    return server.client()

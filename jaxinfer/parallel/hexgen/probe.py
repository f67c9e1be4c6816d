"""`probe`: what this machine's accelerators and connections reach, measured, as a cluster.

Rates are the best of some repetitions, so that what else runs disturbs them least. They are what a
plan needs in place of data sheets, and `compute_share` and `bandwidth_share` are 1 then.
"""

import queue
import re
import socket
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.arguments import real
from jaxinfer.environment import cpu_model
from jaxinfer.parallel.hexgen.inventory import Cluster, Gpu, Link, Machine
from jaxinfer.parallel.message import Message
from jaxinfer.parallel.transport import Listener, TcpConnection, connect
from jaxinfer.progress import Report, silent
from jaxinfer.runtime.memory import available_bytes

SECRET = "probe"  # of a port that is open for the second that this takes
LARGE, SMALL = 4 * 2**20, 64  # bytes of messages


def probe(
    *, dtype: str = "float32", seconds: float = 1.0, name: str | None = None,
    region: str = "here", report: Report = silent,
) -> Cluster:  # fmt: skip
    """A cluster of this machine alone.

    Args:
        dtype: of the matrix products.
        seconds: for each of the four measurements.
        name: the machine's; None is its host name.
        region: where it stands.
        report: is told of every measurement.
    """
    seconds = real("seconds", seconds, 0.01, 600.0)
    device, kind = jax.devices()[0], jnp.dtype(dtype)
    on_cpu = device.platform == "cpu"
    report("probe", 0, 4, "products")
    flops = _flops_per_s(1024 if on_cpu else 8192, kind, seconds)
    report("probe", 1, 4, "memory")
    rate = _bytes_per_s((2**27 if on_cpu else 2**31) // kind.itemsize, kind, seconds)
    report("probe", 2, 4, "link")
    link = _link(seconds)
    report("probe", 4, 4)
    gpu = Gpu(
        name=_plain(cpu_model() if on_cpu else device.device_kind),
        memory_bytes=float(available_bytes(None if on_cpu else device) or 2**30),
        bytes_per_s=rate,
        flops_per_s=flops,
    )
    name = _plain(socket.gethostname() if name is None else name)
    count = 1 if on_cpu else jax.local_device_count()  # virtual devices share one memory
    machine = Machine(name=name, gpu=gpu, count=count, region=_plain(region), link=link)
    return Cluster(machines=(machine,))


def _flops_per_s(size: int, kind: jnp.dtype, seconds: float) -> float:
    a = jnp.ones((size, size), kind)
    product = jax.jit(lambda a, b: a @ b)
    return 2.0 * size**3 / _best_s(lambda: product(a, a), seconds)


def _bytes_per_s(count: int, kind: jnp.dtype, seconds: float) -> float:
    """Of a product of a matrix with a vector, which reads memory as a step does."""
    width = 4096
    a, x = jnp.ones((count // width, width), kind), jnp.ones((width,), kind)
    product = jax.jit(lambda a, x: a @ x)
    return a.nbytes / _best_s(lambda: product(a, x), seconds)


def _link(seconds: float) -> Link:
    """Between two processes' ends of a connection, as stages have it: half of a round trip, and
    what a large message takes beyond that."""
    taken: queue.SimpleQueue[TcpConnection] = queue.SimpleQueue()
    listener = Listener(SECRET, lambda connection, who: _echo(connection, taken))
    near = connect(listener.address, SECRET)
    far = taken.get(timeout=10)

    def there_and_back(size: int) -> Callable[[], None]:
        message = Message("x", {}, (np.zeros(size, np.uint8),))

        def go() -> None:
            near.send(message)
            near.receive(30)

        return go

    try:
        small = _best_s(there_and_back(SMALL), seconds) / 2
        large = _best_s(there_and_back(LARGE), seconds) / 2
    finally:
        near.close()
        far.close()
        listener.close()
    return Link(latency_s=small, bytes_per_s=LARGE / max(large - small, 1e-9))


def _echo(connection: TcpConnection, taken: "queue.SimpleQueue[TcpConnection]") -> None:
    taken.put(connection)
    try:
        while True:
            connection.send(connection.receive())
    except ConnectionError:
        return


def _best_s(work: Callable[[], object], seconds: float) -> float:
    """The least time of a call; the first one, which compiles, does not count."""
    jax.block_until_ready(work())
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        jax.block_until_ready(work())
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _plain(text: str) -> str:
    """A text that may be a name."""
    return re.sub(r"[^\w .()@-]", "", text)[:100].strip() or "machine"

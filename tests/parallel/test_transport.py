"""Messages as bytes, and what a port does with what is none."""

import contextlib
import queue
import socket
import struct
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxinfer.parallel.message import (
    DTYPES,
    HEAD,
    MAGIC,
    BadMessage,
    Head,
    Message,
    decoded,
    encoded,
)
from jaxinfer.parallel.transport import Closed, Delay, Listener, LocalConnection, connect

SECRET = "a secret of the test"

arrays = st.lists(
    st.sampled_from([kind for kind in DTYPES.values() if kind != ml_dtypes.bfloat16]).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    max_size=4,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
messages = st.builds(
    Message, st.text(max_size=20), st.dictionaries(st.text(), values, max_size=4), arrays.map(tuple)
)


def flat(message: Message) -> bytes:
    return b"".join(bytes(part) for part in encoded(message))


def read(data: bytes) -> Message:
    head = Head.of(data[: HEAD.size])
    middle = HEAD.size + head.header
    payload = data[middle : middle + head.payload]
    if len(data) != middle + head.payload:
        raise BadMessage("cut")
    return decoded(head, data[HEAD.size : middle], bytearray(payload))


def same(left: Message, right: Message) -> bool:
    alike = (left.what, left.fields) == (right.what, right.fields)
    return alike and [(x.dtype, x.shape, x.tobytes()) for x in left.arrays] == [
        (x.dtype, x.shape, x.tobytes()) for x in right.arrays
    ]


@settings(max_examples=20, deadline=None)
@given(messages)
def test_a_message_comes_back_bit_by_bit(message):
    assert same(read(flat(message)), message)


def test_bfloat16_comes_back():
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert same(read(flat(Message("x", {}, (x,)))), Message("x", {}, (x,)))


@settings(max_examples=40, deadline=None)
@given(messages, st.data())
def test_a_damaged_message_is_refused(message, data):
    whole = bytearray(flat(message))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(BadMessage):
        read(bytes(whole))


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=64))
def test_a_forged_header_is_refused_whatever_it_says(header, payload):
    """With the right checksum, so that the header itself is read."""
    import zlib

    head = HEAD.pack(MAGIC, len(header), len(payload), zlib.crc32(payload, zlib.crc32(header)))
    with pytest.raises(BadMessage):
        read(head + header + payload)


@pytest.mark.parametrize(
    "kinds",
    [
        '[["float32",[2]]]', '[["float32",[-1]],["float32",[2]]]', '[["object",[1]]]',
        '[["float32",[1.0]]]', '[["float32",[1099511627777]]]', '[["float32",[1,1,1,1,1,1,1,1,1]]]',
        '[["float32",[true]]]', '["float32"]', '{"a":1}',
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_their_bytes_are_refused(kinds):
    import zlib

    header = f'{{"what":"x","fields":{{}},"arrays":{kinds}}}'.encode()
    payload = bytes(4)
    head = HEAD.pack(MAGIC, len(header), 4, zlib.crc32(payload, zlib.crc32(header)))
    with pytest.raises(BadMessage):
        read(head + header + payload)


def test_what_no_message_holds_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="messages have arrays"):
        encoded(Message("x", {}, (np.array([object()]),)))
    with pytest.raises(ValueError, match="too large"):
        encoded(Message("x", {"a": "b" * 2**17}))
    with pytest.raises(ValueError, match="too large"):
        encoded(Message("x", {}, (np.zeros(100),)), limit=700)


@pytest.fixture
def listener():
    taken = queue.SimpleQueue()
    made = Listener(SECRET, lambda connection, who: taken.put((connection, who)))
    made.taken = taken
    yield made
    made.close()


BAD = {
    "garbage": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 64,
    "nothing": b"",
    "cut": flat(Message("hello", {"secret": SECRET}))[:-3],
    "wrong secret": flat(Message("hello", {"secret": "guess"})),
    "no secret": flat(Message("hello", {})),
    "secret of another kind": flat(Message("hello", {"secret": 7})),
    "another word": flat(Message("step", {"secret": SECRET})),
    "oversized": struct.pack("<4sIQI", MAGIC, 64, 2**40, 0),
    "large before the secret": flat(Message("hello", {"secret": SECRET}, (np.zeros(10_000),))),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_connection_is_closed_and_nothing_else_happens(case, listener):
    good = connect(listener.address, SECRET, role="good")
    other_end, who = listener.taken.get(timeout=5)
    assert who == {"role": "good"}
    with socket.create_connection(listener.address) as bad:
        bad.settimeout(5)
        with contextlib.suppress(ConnectionError, OSError):  # closed before all was sent
            bad.sendall(BAD[case])
            bad.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert bad.recv(1) == b""  # closed by the other end
    assert listener.taken.empty()
    good.send(Message("still", {"here": True}, (np.arange(3),)))
    assert same(other_end.receive(5), Message("still", {"here": True}, (np.arange(3),)))


def test_a_damaged_message_ends_an_established_connection(listener):
    good = connect(listener.address, SECRET)
    end, _ = listener.taken.get(timeout=5)
    data = bytearray(flat(Message("x", {}, (np.zeros(4),))))
    data[-1] ^= 1
    good._socket.sendall(data)
    with pytest.raises(Closed, match="checksum"):
        end.receive(5)
    with pytest.raises(Closed):
        good.receive(5)


def test_large_messages_arrive_whole_in_both_directions(listener):
    near = connect(listener.address, SECRET)
    far, _ = listener.taken.get(timeout=5)
    big = np.random.default_rng(0).integers(0, 2**31, 3 * 2**20).astype(np.int32)

    def answer():
        far.send(far.receive(20))

    thread = threading.Thread(target=answer)
    thread.start()
    near.send(Message("big", {}, (big, big[:0])))
    assert same(near.receive(20), Message("big", {}, (big, big[:0])))
    thread.join()


def test_timeouts_and_ends(listener):
    near = connect(listener.address, SECRET)
    far, _ = listener.taken.get(timeout=5)
    with pytest.raises(TimeoutError):
        near.receive(0.05)
    far.close()
    with pytest.raises(Closed):
        near.receive(5)
    with pytest.raises(Closed, match="nobody listens"):
        connect(("127.0.0.1", 1), SECRET)


def test_a_delay_holds_messages_back_without_adding_up():
    """Latency is that of each message, the rate is shared."""
    taken = queue.SimpleQueue()
    delay = Delay(latency_s=0.1, bytes_per_s=1e6)
    listener = Listener(SECRET, lambda connection, who: taken.put(connection), delay=delay)
    near = connect(listener.address, SECRET, delay=delay)
    far = taken.get(timeout=5)
    start = time.monotonic()
    for _ in range(3):
        near.send(Message("x", {}, (np.zeros(50_000, np.uint8),)))
    for _ in range(3):
        far.receive(5)
    assert 0.24 < time.monotonic() - start < 1.0  # 0.1 + 3 * 0.05
    listener.close()


def test_a_local_pair_hands_messages_over():
    near, far = LocalConnection.pair()
    x = np.zeros(2)
    near.send(Message("x", {}, (x,)))
    assert far.receive(1).arrays[0] is x
    with pytest.raises(TimeoutError):
        far.receive(0.01)
    near.close()
    with pytest.raises(Closed):
        far.receive(1)
    with pytest.raises(Closed):
        far.send(Message("x", {}))

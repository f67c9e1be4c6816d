"""Token files and the order of their windows."""

import numpy as np
import pytest

from jaxinfer.train.data import TokenWindows, write_tokens


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokens.bin"
    write_tokens(path, [list(range(1, 400)), list(range(400, 1001))], end=0)
    return path


def test_documents_are_laid_end_to_end_with_the_end_token(tmp_path):
    count = write_tokens(tmp_path / "t.bin", [[5, 6], [], [7]], end=1)
    assert count == 6
    assert np.fromfile(tmp_path / "t.bin", "<u2").tolist() == [5, 6, 1, 1, 7, 1]


def test_a_batch_is_a_function_of_seed_and_step(path):
    windows = TokenWindows(path, length=16, batch_size=4, seed=3)
    forwards = [windows.batch(step) for step in range(40)]
    again = TokenWindows(path, length=16, batch_size=4, seed=3)
    for step in reversed(range(40)):
        np.testing.assert_array_equal(again.batch(step), forwards[step])


def test_another_seed_gives_another_order(path):
    first = TokenWindows(path, length=16, batch_size=4, seed=0).batch(0)
    second = TokenWindows(path, length=16, batch_size=4, seed=1).batch(0)
    assert not np.array_equal(first, second)


def test_windows_hold_consecutive_tokens(path):
    batch = TokenWindows(path, length=16, batch_size=8).batch(5)
    assert batch.shape == (8, 17) and batch.dtype == np.int32
    # The file counts upwards but for the two end tokens.
    steps = np.diff(batch, axis=1)
    assert np.isin(steps, [1]).mean() > 0.97


def test_an_epoch_visits_every_window_once(path):
    windows = TokenWindows(path, length=16, batch_size=1)
    starts = [int(windows.batch(step)[0, 0]) for step in range(windows.windows_per_epoch)]
    assert len(set(starts)) == windows.windows_per_epoch


def test_ids_beyond_sixteen_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint16"):
        write_tokens(tmp_path / "t.bin", [[70000]], end=0)


def test_a_file_too_short_for_one_window_is_refused(path):
    with pytest.raises(ValueError, match="too few"):
        TokenWindows(path, length=5000, batch_size=1)

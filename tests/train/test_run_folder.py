"""What a run leaves behind for the next one, sound or damaged."""

import numpy as np
import pytest

from jaxinfer.train.run_folder import check_options, read_array, read_arrays, write_arrays


def test_a_run_goes_on_with_the_same_options_only(tmp_path):
    check_options(tmp_path, {"steps": 3})
    check_options(tmp_path, {"steps": 3})
    with pytest.raises(ValueError, match="was started with other steps; use a new --run-dir"):
        check_options(tmp_path, {"steps": 4})


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"steps":'])
def test_damaged_options_name_the_file_and_the_remedy(tmp_path, content):
    file = tmp_path / "options.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"options.json.*remove it .*--run-dir") as caught:
        check_options(tmp_path, {"steps": 3})
    assert "\n" not in str(caught.value)
    file.unlink()
    check_options(tmp_path, {"steps": 3})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01", b"text"])
def test_damaged_arrays_name_the_file_and_the_remedy(tmp_path, content):
    write_arrays(tmp_path / "a.npz", {"x": np.arange(3)})
    assert read_arrays(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    for name, read in (("a.npz", read_arrays), ("b.npy", read_array)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged .*remove it"):
            read(tmp_path / name)

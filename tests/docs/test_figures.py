"""Every number of the README's table of results is in the file that its row links."""

import re

import pytest

from tests.docs.markdown import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?![\w-]*bit| bits)")
TABLE = README.partition("## Measured results")[2].partition("\n[")[0]
FILES = dict(re.findall(r"^\[([\w-]+)\]: (bench/results/\S+)$", README, re.M))


def rows() -> list[tuple[str, list[str], str]]:
    """What each row measures, the numbers of its second and third column, and its file."""
    found, file = [], ""
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or cells[0] in ("Measurement", "---"):
            continue
        link = re.match(r"\[([\w-]+)\]", cells[3])
        file = FILES[link[1]] if link else file  # "the same"
        found.append((cells[0], NUMBER.findall(f"{cells[1]} {cells[2]}"), file))
    return found


def states(values: list[float], number: str) -> bool:
    """Whether one of `values` rounds to `number`: itself, as a percentage, or as an increase."""
    digits = len(number.partition(".")[2])
    wanted, half = float(number.replace(",", "")), 0.5001 * 10.0**-digits
    return any(abs(form - wanted) <= half for v in values for form in (v, 100 * v, 100 * v - 100))


@pytest.mark.parametrize("what, numbers, file", rows(), ids=lambda x: x if type(x) is str else "")
def test_the_numbers_of_a_row_are_in_its_file(what, numbers, file):
    text = (ROOT / file).read_text(encoding="utf-8").replace(",", "")
    values = [float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]
    assert numbers, "the row states no number"
    missing = [number for number in numbers if not states(values, number)]
    assert not missing, f"{file} does not have {missing}"


def test_a_number_that_was_not_measured_is_found_out():
    assert states([1.116, 26.84], "26.8") and states([1.116], "12") and states([0.94], "94")
    assert not states([1.116, 26.84], "26.9") and not states([0.94], "95")

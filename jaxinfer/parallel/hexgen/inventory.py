"""The machines that may serve a model: accelerators, links, regions and prices.

A cluster is what planning knows of the world (HexGen, arXiv 2311.11514, section 2). It comes from
a JSON or TOML file:

    {"version": 1,
     "gpus": {"a5000": {"memory_bytes": 24e9, "bytes_per_s": 768e9, "flops_per_s": 111e12}},
     "machines": [{"name": "m0", "gpu": "a5000", "count": 8, "region": "nevada",
                   "link": {"latency_s": 5e-6, "bytes_per_s": 12e9}, "price_per_hour": 3.5}],
     "same_region": {"latency_s": 2e-4, "bytes_per_s": 1.25e9},
     "other_regions": {"latency_s": 0.05, "bytes_per_s": 6.25e7},
     "links": [{"between": ["nevada", "iceland"], "latency_s": 0.07, "bytes_per_s": 6.25e7}]}

A link between two named machines counts before one between their regions. All units are SI.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfer.arguments import of_kind, real, shown, whole
from jaxinfer.fields import known_fields
from jaxinfer.files import one_line, quoted, read_json, read_text
from jaxinfer.typing import Json

VERSION = 1
MOST_MACHINES, MOST_GPUS = 256, 1024  # GPUs of one machine
FILE_LIMIT = 4 * 2**20  # bytes
SMALLEST, LARGEST = 1e-3, 1e30  # of any size or rate


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of accelerator.

    `compute_share` and `bandwidth_share` are the parts of the vendor's rates that are reached; 1
    plans with the data sheet, and real kernels reach 0.5 to 0.8.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float  # of its memory
    flops_per_s: float  # of matrix products in the model's number format
    bandwidth_share: float = 1.0
    compute_share: float = 1.0

    def __post_init__(self):
        _check_name("gpu name", self.name)
        for field in ("memory_bytes", "bytes_per_s", "flops_per_s"):
            real(f"{field} of gpu {quoted(self.name)}", getattr(self, field), 1.0, LARGEST)
        for field in ("bandwidth_share", "compute_share"):
            real(f"{field} of gpu {quoted(self.name)}", getattr(self, field), SMALLEST, 1.0)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A message of n bytes takes `latency_s + n / bytes_per_s` seconds."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self):
        real("latency_s of a link", self.latency_s, 0.0, 1e6)
        real("bytes_per_s of a link", self.bytes_per_s, SMALLEST, LARGEST)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`count` equal accelerators, joined by `link`."""

    name: str
    gpu: Gpu
    count: int
    region: str
    link: Link
    price_per_hour: float = 0.0  # of the whole machine

    def __post_init__(self):
        _check_name("machine name", self.name)
        _check_name("region", self.region)
        of_kind(f"gpu of machine {quoted(self.name)}", self.gpu, Gpu, "a Gpu")
        of_kind(f"link of machine {quoted(self.name)}", self.link, Link, "a Link")
        whole(f"count of machine {quoted(self.name)}", self.count, 0, MOST_GPUS)
        real(f"price_per_hour of machine {quoted(self.name)}", self.price_per_hour, 0.0, LARGEST)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines and the links between them; every pair must have one.

    Example:
        >>> gpu = Gpu(name="a4000", memory_bytes=16e9, bytes_per_s=448e9, flops_per_s=77e12)
        >>> inside = Link(latency_s=5e-6, bytes_per_s=12e9)
        >>> box = Machine(name="box", gpu=gpu, count=4, region="here", link=inside)
        >>> Cluster(machines=(box,)).counts
        (4,)
    """

    machines: tuple[Machine, ...]
    same_region: Link | None = None
    other_regions: Link | None = None
    links: tuple[tuple[str, str, Link], ...] = ()  # between two machines or two regions

    def __post_init__(self):
        whole("the number of machines", len(self.machines), 1, MOST_MACHINES)
        names = [machine.name for machine in self.machines]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two machines are called {quoted(twice)}; names must differ")
        regions = {machine.region for machine in self.machines}
        both = next((name for name in names if name in regions), None)
        if both is not None and self.links:
            raise ValueError(f"{quoted(both)} is a machine and a region; links could mean either")
        for one, other, _ in self.links:
            for name in (one, other):
                if name not in regions and name not in names:
                    raise ValueError(f"a link joins {quoted(name)}, which is no machine or region")
        for i in range(len(names)):
            for j in range(i):
                self.link(i, j)

    @property
    def counts(self) -> tuple[int, ...]:
        """Accelerators per machine."""
        return tuple(machine.count for machine in self.machines)

    @property
    def price_per_hour(self) -> float:
        """Of all machines."""
        return sum(machine.price_per_hour for machine in self.machines)

    @functools.cached_property
    def _named(self) -> dict[frozenset[str], Link]:
        return {frozenset((one, other)): link for one, other, link in self.links}

    def link(self, i: int, j: int) -> Link:
        """The link between accelerators of machines `i` and `j`, or inside machine `i`.

        Raises:
            ValueError: nothing says how two machines are joined.
        """
        one, other = self.machines[i], self.machines[j]
        if i == j:
            return one.link
        default = self.same_region if one.region == other.region else self.other_regions
        regions = self._named.get(frozenset((one.region, other.region)), default)
        found = self._named.get(frozenset((one.name, other.name)), regions)
        if found is None:
            raise ValueError(
                f"no link between machines {quoted(one.name)} and {quoted(other.name)}; give "
                "same_region, other_regions or one of links"
            )
        return found

    def without(self, machine: str, count: int | None = None) -> "Cluster":
        """The cluster after `count` accelerators of a machine are lost; all of them by default.

        The machine stays with what is left, so that plans of both clusters count machines alike.
        """
        found = next((one for one in self.machines if one.name == machine), None)
        if found is None:
            raise ValueError(f"no machine is called {quoted(machine)}")
        lost = found.count if count is None else whole("count", count, 0, found.count)
        left = dataclasses.replace(found, count=found.count - lost)
        machines = tuple(left if one is found else one for one in self.machines)
        return dataclasses.replace(self, machines=machines)

    def to_dict(self) -> Json:
        """A JSON-ready dictionary; `Cluster.from_dict` reads it back."""
        gpus = {machine.gpu.name: dataclasses.asdict(machine.gpu) for machine in self.machines}
        machines = [
            dataclasses.asdict(machine) | {"gpu": machine.gpu.name} for machine in self.machines
        ]
        links = [
            {"between": [one, other]} | dataclasses.asdict(link) for one, other, link in self.links
        ]
        found = {"version": VERSION, "gpus": gpus, "machines": machines, "links": links}
        for name in ("same_region", "other_regions"):
            link = getattr(self, name)
            if link is not None:
                found[name] = dataclasses.asdict(link)
        return found

    @classmethod
    def from_dict(cls, data: Json) -> "Cluster":
        """The cluster that a dictionary of the form above describes.

        Raises:
            ValueError: anything in it is missing, unknown or out of range.
        """
        known = {"version", "gpus", "machines", "links", "same_region", "other_regions"}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown field {quoted(unknown[0])} of a cluster; known are {known}")
        if data.get("version") != VERSION:
            raise ValueError(
                f"version of a cluster must be {VERSION}, got {shown(data.get('version'))}"
            )
        of_kind("gpus", data.get("gpus"), dict, "an object of kinds by name")
        for field in ("machines", "links"):
            of_kind(field, data.get(field, []), list, "a list")
        gpus = {name: _made(Gpu, one, name=name) for name, one in data["gpus"].items()}
        machines = data.get("machines", [])
        whole("the number of machines", len(machines), 1, MOST_MACHINES)
        whole("the number of links", len(data.get("links", [])), 0, MOST_MACHINES**2)
        return cls(
            machines=tuple(_machine(one, gpus) for one in machines),
            same_region=_link(data.get("same_region")),
            other_regions=_link(data.get("other_regions")),
            links=tuple(_named_link(one) for one in data.get("links", [])),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Cluster":
        """The cluster of a JSON or TOML file.

        Raises:
            ValueError: it is too large, does not parse, or describes no cluster; names the file.
        """
        path = Path(path)
        if path.suffix == ".toml":
            try:
                data = tomllib.loads(read_text(path, FILE_LIMIT))
            except (tomllib.TOMLDecodeError, RecursionError) as error:
                raise ValueError(f"{path} is not valid TOML: {one_line(error)}") from error
        else:
            data = read_json(path, FILE_LIMIT)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{one_line(path, 1000)}: {error}") from error


def _machine(data: object, gpus: dict[str, Gpu]) -> Machine:
    of_kind("a machine", data, dict, "an object")
    assert isinstance(data, dict)
    kind = data.get("gpu")
    if not isinstance(kind, str) or kind not in gpus:
        raise ValueError(f"gpu of a machine must be one of {sorted(gpus)}, got {shown(kind)}")
    return _made(Machine, data, gpu=gpus[kind], link=_link(data.get("link")))


def _link(data: object) -> Link | None:
    return None if data is None else _made(Link, data)


def _named_link(data: object) -> tuple[str, str, Link]:
    of_kind("one of links", data, dict, "an object")
    assert isinstance(data, dict)
    names = data.get("between")
    if not _is_pair(names):
        raise ValueError(f"between must be two names, got {shown(names)}")
    assert isinstance(names, list)
    rest = {name: value for name, value in data.items() if name != "between"}
    return names[0], names[1], _made(Link, rest)


def _is_pair(names: object) -> bool:
    return (
        isinstance(names, Sequence) and len(names) == 2 and all(isinstance(n, str) for n in names)
    )


def _made(kind: type, data: object, **given: object):
    of_kind(kind.__name__.lower(), data, dict, "an object")
    assert isinstance(data, dict)
    return kind(**known_fields(kind, data | given))


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 100 or not name.isprintable():
        raise ValueError(f"{what} must be a text of 1 to 100 characters, got {shown(name)}")

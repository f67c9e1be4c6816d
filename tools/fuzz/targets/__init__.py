"""The parsers by name."""

from collections.abc import Sequence

from tools.fuzz.target import Target
from tools.fuzz.targets import artefacts, checkpoints, policies, requests

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *checkpoints.TARGETS,
        *artefacts.TARGETS,
        *policies.TARGETS,
        *requests.TARGETS,
    )
}


def chosen(names: Sequence[str] | None) -> list[Target]:
    """The targets of these names; all without any."""
    return [TARGETS[name] for name in (TARGETS if names is None else names)]

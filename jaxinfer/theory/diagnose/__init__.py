"""Which cache policy each layer of a model should have, from what compression does to it.

`candidates_for` are the policies to choose from, `diagnose` measures what each does to each layer,
`Diagnosis.losses` is a score of that, and `allocate` chooses within a budget of bytes.
`nearest_texts` ranks texts to calibrate on.
"""

from jaxinfer.theory.diagnose.allocate import allocate
from jaxinfer.theory.diagnose.calibration import Nearness, nearest_texts
from jaxinfer.theory.diagnose.candidates import Candidate, candidates_for
from jaxinfer.theory.diagnose.diagnosis import SCORES, Diagnosis, diagnose

__all__ = [
    "SCORES",
    "Candidate",
    "Diagnosis",
    "Nearness",
    "allocate",
    "candidates_for",
    "diagnose",
    "nearest_texts",
]

"""One token of a diagonal complex recurrence (Laughing Hyena), alone or in a Hyena layer."""

from pallas_kernels.modal_step.api import hyena_step, modal_step

__all__ = ["hyena_step", "modal_step"]

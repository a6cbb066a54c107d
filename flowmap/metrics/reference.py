"""The reference statistics that a Frechet distance asks for: those of a file, or of all training pictures (`auto`)."""

from __future__ import annotations

from flowmap.metrics.features import is_fixed, short_name, width_of
from flowmap.metrics.statistics import Statistics, read_statistics

AUTO = "auto"
HELD_OUT = "held_out"
SETS = ("train", HELD_OUT)
UNKNOWN = 10**12  # stands for the number of samples of a file that does not state it, for the law of the bias


def check_reference(reference: str | None, of: str, features: str, images: int | None) -> None:
    """Raise ValueError for settings of a reference that do not fit together."""
    if of not in SETS:
        raise ValueError(f"reference_of: {of!r} is not one of {', '.join(SETS)}")
    if reference is None:
        if of != SETS[0]:
            raise ValueError(f"reference_of: {of!r} describes a file, and reference is null")
        return
    if not is_fixed(features):
        fixed = "inception, dinov2, efficientnet_lite0, clip or package.mod:attr"
        raise ValueError(f"reference: features {features!r} are fitted to the training samples; allowed: {fixed}")
    if images is not None:
        raise ValueError(f"reference_images: {images} draws from the data's own samples, and reference is given")
    if reference == AUTO and of == HELD_OUT:
        raise ValueError("reference_of: 'held_out' wants a file; reference: auto is of the training pictures")


def statistics_for(reference: str, features: str, weights: str | None = None) -> Statistics:
    """The statistics in that file; ValueError if it cannot be read or is of another feature space."""
    if reference == AUTO:
        raise ValueError("metrics: reference: auto names no file yet; flowmap.plan.references.located gives it one")
    try:
        found = read_statistics(reference)
    except ValueError as error:
        made = "; `flowmap reference` makes one" if "no such file" in str(error) else ""
        raise ValueError(f"metrics: reference: {error}{made}") from error
    if found.features not in (None, short_name(features)):
        raise ValueError(f"metrics: reference: {reference}: is of features {found.features!r}, not {features!r}")
    wanted = width_of(features, weights)
    if wanted not in (None, found.width):
        raise ValueError(
            f"metrics: reference: {reference}: is of {found.width} features, and {features!r} has {wanted}"
        )
    return found

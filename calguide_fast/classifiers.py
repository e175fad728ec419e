"""Classifiers as a caller gives them: one or several, bare, or loaded by name with what they look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from calguide_fast.models.specs import LoadedClassifier
from calguide_fast.networks import check_callable

Classifier = Callable[..., Tensor] | LoadedClassifier

INPUTS = ("x0", "xt")


class Given(NamedTuple):
    """What to run."""

    networks: tuple[Callable[..., Tensor], ...]  # none where no classifier is given
    classifier_input: str  # "x0" or "xt"
    several: bool  # they were given in a list, if only in one of one


def as_given(
    classifier: Classifier | Sequence[Classifier] | None,
    classifier_input: str | None = None,
    name: str = "classifier_input",
) -> Given:
    """The networks of one classifier, of a list of them, or of none, and what they look at.

    Args:
        classifier: each a callable, or what :func:`calguide_fast.models.load_classifier` returns.
        classifier_input: ``"x0"`` or ``"xt"``; None for that of the loaded classifiers, or else ``"x0"``.
        name: what errors call it.

    Raises:
        TypeError: a classifier that cannot be called.
        ValueError: an empty list, an unknown classifier_input or another than that of a loaded classifier.
    """
    if classifier_input is not None and classifier_input not in INPUTS:
        raise ValueError(f"{name}={classifier_input!r} must be {' or '.join(map(repr, INPUTS))}")
    # a loaded classifier is a tuple itself
    several = isinstance(classifier, (list, tuple, nn.ModuleList)) and not isinstance(classifier, LoadedClassifier)
    given: tuple[Any, ...] = tuple(classifier) if several else () if classifier is None else (classifier,)  # type: ignore[arg-type]
    if several and not given:
        raise ValueError("classifier=[] must hold at least one classifier")
    inputs = {one.classifier_input for one in given if isinstance(one, LoadedClassifier)}
    if len(inputs | {classifier_input} - {None}) > 1:
        asked = "one list" if classifier_input is None else f"{name}={classifier_input!r}"
        raise ValueError(f"{asked} does not go with loaded classifiers that look at {' and '.join(sorted(inputs))}")
    networks = tuple(one.module if isinstance(one, LoadedClassifier) else one for one in given)
    for index, network in enumerate(networks):
        check_callable(f"classifier[{index}]" if several else "classifier", network)
    return Given(networks, classifier_input or (inputs.pop() if inputs else "x0"), several)


def as_single(
    classifier: Classifier, classifier_input: str | None = None, name: str = "classifier_input"
) -> tuple[Callable[..., Tensor], str]:
    """The network of one classifier, and what it looks at; as :func:`as_given`, but no list."""
    given = as_given(classifier, classifier_input, name)
    if given.several or not given.networks:
        raise TypeError(f"classifier must be a single one, got {type(classifier).__name__}")
    return given.networks[0], given.classifier_input

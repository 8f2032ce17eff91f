"""Scores of a run at its end: its hardest and easiest examples, and its classes."""

import dataclasses
import pathlib

import numpy as np

from issgd_jax.errors import InputError
from issgd_jax.run import pictures
from issgd_jax.view import examples, snapshots

# Larger images are shrunk: a page of them stays small.
_MOST_PIXELS = 96


@dataclasses.dataclass(frozen=True)
class Example:
    """A training example.

    Attributes:
      index: into the training data.
      score: its last known.
      staleness: learner steps since the parameters that gave the score.
      times_drawn: how often it was in a minibatch; None: not known.
      label: None: not known.
      png: its image; None: there is none.
    """

    index: int
    score: float
    staleness: int
    times_drawn: int | None = None
    label: int | None = None
    png: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of a run.

    Attributes:
      num_examples: N.
      step: of the scores.
      half: share of the examples, those with the largest scores, that have half of the sum of all scores.
      hardest: the examples with the largest scores, the largest first.
      easiest: those with the smallest, the smallest first.
      classes: by label; () where labels are not known.
      missing: why there are no images; None: there are.
    """

    num_examples: int
    step: int
    half: float
    hardest: tuple[Example, ...]
    easiest: tuple[Example, ...]
    classes: tuple[examples.ClassScores, ...]
    missing: str | None


def read(folder: pathlib.Path, k: int) -> Scored:
    """Returns the scores of a run, of its end or else of its newest checkpoint.

    Args:
      folder: of the run.
      k: number of hardest, and of easiest, examples.

    Raises:
      InputError: the run has no scores, or they cannot be read.
    """
    seen = snapshots.newest(folder)
    score, known = seen.score, np.flatnonzero(seen.scored)
    if not len(known):
        raise InputError(f"no example of {folder} has a score yet: wait for the first round of scoring")
    order = known[np.argsort(score[known], kind="stable")]
    dataset, missing = None, "the problem is one of the user's own, whose data is not loaded here"
    try:
        dataset = examples.load(folder, len(score))
    except InputError as error:
        missing = str(error)

    if dataset is not None:
        channels = dataset.images.shape[-1]
        missing = None if channels in (1, 3) else f"they have {channels} channels"
    has_images = missing is None

    def describe(indices):
        return tuple(
            Example(
                int(index),
                float(score[index]),
                int(seen.staleness[index]),
                None if seen.times_drawn is None else int(seen.times_drawn[index]),
                None if dataset is None else int(dataset.labels[index]),
                pictures.thumbnail(dataset.images[index], _MOST_PIXELS) if has_images else None,
            )
            for index in indices
        )

    rising = np.cumsum(score[order])
    half = 1 - np.searchsorted(rising, rising[-1] / 2) / len(order)
    most, least = describe(order[::-1][:k]), describe(order[:k])
    classes = () if dataset is None else examples.by_class(dataset.labels, score, seen.scored)
    return Scored(len(score), seen.step, float(half), most, least, classes, missing)

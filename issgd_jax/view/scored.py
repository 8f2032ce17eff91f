"""Scores of a run at its end: its hardest and easiest examples, and its classes."""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image

from issgd_jax.errors import InputError
from issgd_jax.run import checkpoint, workdir
from issgd_jax.sampling.store import NEVER, ScoreStore
from issgd_jax.view import examples, hardest

# Larger images are shrunk: a page of them stays small.
_MOST_PIXELS = 96


@dataclasses.dataclass(frozen=True)
class Example:
    """A training example.

    Attributes:
      index: into the training data.
      score: its last known.
      age: learner steps since the parameters that gave the score.
      label: None: not known.
      png: its image; None: there is none.
    """

    index: int
    score: float
    age: int
    label: int | None = None
    png: bytes | None = None


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Scores of the examples of one class.

    Attributes:
      label: of the class.
      examples: their number.
      mean: of their scores, those without a score left out.
      share: of the class in the sum of all scores.
    """

    label: int
    examples: int
    mean: float
    share: float


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
    classes: tuple[ClassScores, ...]
    missing: str | None


def read(folder: pathlib.Path, k: int) -> Scored:
    """Returns the scores of a run, of its end or else of its newest checkpoint.

    Args:
      folder: of the run.
      k: number of hardest, and of easiest, examples.

    Raises:
      InputError: the run has no scores, or they cannot be read.
    """
    step, store = _newest(folder)
    score, scored_at = np.asarray(store.score, np.float64), np.asarray(store.scored_at, np.int64)
    known = np.flatnonzero(scored_at != NEVER)
    if not len(known):
        raise InputError(f"no example of {folder} has a score yet: wait for the first round of scoring")
    order = known[np.argsort(score[known], kind="stable")]
    dataset, missing = None, "the problem is one of the user's own, whose data is not loaded here"
    try:
        dataset = examples.load(folder, len(score))
    except InputError as error:
        missing = str(error)

    def describe(indices):
        return tuple(
            Example(
                int(index),
                float(score[index]),
                int(step - scored_at[index]),
                None if dataset is None else int(dataset.labels[index]),
                None if dataset is None else _png(dataset.images[index]),
            )
            for index in indices
        )

    rising = np.cumsum(score[order])
    half = 1 - np.searchsorted(rising, rising[-1] / 2) / len(order)
    most, least = describe(order[::-1][:k]), describe(order[:k])
    if dataset is not None:
        missing = None if most[0].png else f"they have {dataset.images.shape[-1]} channels"
    classes = () if dataset is None else _classes(dataset.labels, score, scored_at != NEVER)
    return Scored(len(score), step, float(half), most, least, classes, missing)


def _newest(folder: pathlib.Path) -> tuple[int, ScoreStore]:
    if (folder / workdir.SCORES_FILE).is_file():
        ((step, store),) = hardest.last_scores(folder).items()
        return step, store
    if not checkpoint.steps_in(folder / workdir.CHECKPOINTS):
        raise InputError(f"{folder} has no {workdir.SCORES_FILE}, which a run writes at its end, and no checkpoint")
    return max(hardest.checkpointed_scores(folder).items())


def _classes(labels: np.ndarray, score: np.ndarray, known: np.ndarray) -> tuple[ClassScores, ...]:
    counts, scored = np.bincount(labels), np.bincount(labels, known)
    sums = np.bincount(labels, score)
    return tuple(
        ClassScores(
            label, int(counts[label]), sums[label] / max(scored[label], 1), sums[label] / max(sums.sum(), 1e-300)
        )
        for label in np.flatnonzero(counts).tolist()
    )


def _png(image: np.ndarray) -> bytes | None:
    """Returns an image uint8[H, W, channels] as PNG, from its darkest to its brightest value; None: it is none."""
    channels = image.shape[-1]
    if channels not in (1, 3):
        return None
    low, high = int(image.min()), int(image.max())
    scaled = ((image.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)
    picture = Image.fromarray(scaled[..., 0] if channels == 1 else scaled)
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()

"""The training examples of a run, and the scores of their classes. Imports no jax."""

import dataclasses
import functools
import pathlib

import numpy as np

from issgd_jax import records
from issgd_jax.errors import InputError
from issgd_jax.run import workdir
from issgd_jax.task import data


def load(folder: pathlib.Path, num_examples: int, data_dir: str | None = None) -> data.Dataset | None:
    """Returns the training data of a run; None of a problem of the user's own, whose code must not be executed.

    Args:
      folder: of the run.
      num_examples: that the run had.
      data_dir: folder of TFDS; None: that of the run.

    Raises:
      InputError: config.json is malformed; the data is missing, or has another number of examples.
    """
    with records.parsing(folder / workdir.CONFIG_FILE, "repair it"):
        config = workdir.read_record(folder)["config"]
        if config.get("problem") is not None:
            return None
        name, split, data_dir = config["data"]["name"], config["data"]["train_split"], data_dir or config["data"]["dir"]
    try:
        dataset = data.load(name, split, data_dir)
    except InputError as error:
        raise InputError(f"{error} (here: --data_dir=FOLDER)") from error
    if len(dataset) != num_examples:
        raise InputError(
            f"{name} {split} has {len(dataset):,} examples, but the run in {folder} had {num_examples:,}: name the "
            "folder of its data with --data_dir"
        )
    return dataset


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


def by_class(labels: np.ndarray, score: np.ndarray, scored: np.ndarray) -> tuple[ClassScores, ...]:
    """Returns the scores of each class that has examples.

    Args:
      labels: i[N], >= 0.
      score: f64[N], 0 where there is none.
      scored: bool[N], where there is one.

    Example:
      >>> [found.share for found in by_class(np.array([0, 1, 1]), np.array([1.0, 3.0, 0.0]), np.array([1, 1, 0]))]
      [0.25, 0.75]
    """
    counts, num_scored, sums = np.bincount(labels), np.bincount(labels, scored), np.bincount(labels, score)
    return tuple(
        ClassScores(
            label,
            int(counts[label]),
            float(sums[label] / max(num_scored[label], 1)),
            float(sums[label] / max(sums.sum(), 1e-300)),
        )
        for label in np.flatnonzero(counts).tolist()
    )


def at_end_by_class(folder: pathlib.Path) -> tuple[ClassScores, ...]:
    """Returns the final scores of each class; () where the run has none yet, or its data is not on this machine.

    Args:
      folder: of a run; the result of unchanged scores is remembered.

    Raises:
      InputError: the file of scores is damaged.
    """
    path = folder / workdir.SCORES_FILE
    try:
        return _at_end_by_class(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return ()


@functools.lru_cache(maxsize=64)
def _at_end_by_class(path: pathlib.Path, changed_at: int) -> tuple[ClassScores, ...]:
    del changed_at
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            score, scored = np.asarray(arrays["score"], np.float64), arrays["scored_at"] >= 0
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises many types
        raise InputError(f"{path} is not a file of scores ({error!r}): remove it") from error
    try:
        dataset = load(path.parent, len(score))
    except InputError:
        return ()
    return () if dataset is None else by_class(dataset.labels, score, scored)

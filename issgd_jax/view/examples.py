"""The training examples of a run, and which classes have the largest scores. Imports no jax."""

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


def class_shares(folder: pathlib.Path) -> np.ndarray | None:
    """Returns the share of each class in the sum of the final scores, f64[C]; None where scores or labels are missing.

    Args:
      folder: of a run; the result of unchanged scores is remembered.
    """
    path = folder / workdir.SCORES_FILE
    try:
        return _class_shares(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _class_shares(path: pathlib.Path, changed_at: int) -> np.ndarray | None:
    del changed_at
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            score = np.asarray(arrays["score"], np.float64)
        dataset = load(path.parent, len(score))
        sums = np.bincount(dataset.labels, score, minlength=dataset.num_classes)
        return sums / sums.sum() if np.isfinite(sums).all() and sums.sum() > 0 else None
    except Exception:  # a damaged archive raises many types; it is one line less
        return None

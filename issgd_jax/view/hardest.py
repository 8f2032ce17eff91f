"""The examples of a run with the largest scores: a hint for wrong labels, and what training is about."""

import dataclasses
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure

from issgd_jax import records
from issgd_jax.errors import InputError
from issgd_jax.paths import local_path
from issgd_jax.run import checkpoint, workdir
from issgd_jax.sampling.store import NEVER, ScoreStore
from issgd_jax.view import examples

# Pictures in a grid that a person can still look through.
MAX_IMAGES = 400
# Which scores count: those at the end of a run, or the mean over its checkpoints.
LAST, MEAN = "last", "mean"
_FIELDS = ("score", "scored_at")
_STORE = tuple(f"sampler_state.{name}" for name in _FIELDS)


@dataclasses.dataclass(frozen=True)
class Hardest:
    """The examples with the largest scores, the largest first.

    Attributes:
      indices: i64[k], into the training data.
      scores: f64[k].
      ages: i64[k], learner steps from the parameters that gave a score to the end of the run; of a mean, from the last.
      labels: i32[k]; None: the problem is not one of images that the config names.
      images: uint8[k, H, W, channels]; None likewise.
      num_examples: N.
      steps: of which scores were read; more than one for a mean.
    """

    indices: np.ndarray
    scores: np.ndarray
    ages: np.ndarray
    labels: np.ndarray | None
    images: np.ndarray | None
    num_examples: int
    steps: tuple[int, ...]

    def __str__(self):
        by = f"score of step {self.steps[-1]:,}"
        if len(self.steps) > 1:
            by = f"mean score of {len(self.steps)} steps, {self.steps[0]:,} to {self.steps[-1]:,}"
        labels = ["-"] * len(self.indices) if self.labels is None else self.labels
        rows = (
            f"{index:>9}{label!s:>7}{score:>12.4g}{age:>9,}"
            for index, label, score, age in zip(self.indices, labels, self.scores, self.ages)
        )
        return "\n".join(
            [
                f"{len(self.indices):,} of {self.num_examples:,} examples with the largest {by}",
                f"{'index':>9}{'label':>7}{'score':>12}{'age':>9}",
                *rows,
                *self._commonest(),
            ]
        )

    def _commonest(self) -> list[str]:
        """Returns a line about the class with most of the examples."""
        if self.labels is None:
            return []
        counts = np.bincount(self.labels)
        return [f"class {counts.argmax()} has most of them, {counts.max():,} of {len(self.labels):,}"]


def hardest(run: str | pathlib.Path, k: int = 50, *, by: str = LAST, data_dir: str | None = None) -> Hardest:
    """Returns the k examples with the largest score of a run.

    A large score is a HINT for a wrong label, no proof: hard and rare examples have one too, and a network that has
    memorised a wrong label gives it a small one. The mean over a run finds wrong labels better, see `docs/see.md`.

    Args:
      run: folder of the run.
      k: number of examples, at most as many as have a score.
      by: `last`, the scores at the end of the run; `mean`, the mean over its checkpoints, each example's over those in
        which it has a score: let the run keep many (checkpoint.every_steps, checkpoint.keep), evenly over its steps.
      data_dir: folder of TFDS, where the data is no longer where the run found it; None: as the run.

    Raises:
      InputError: the folder holds no run, or one without scores; k is out of range; the data is missing, or has another
        number of examples; a file is malformed.

    Example:
      >>> hardest("runs/none", k=10)
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run: name the --workdir of one
    """
    folder = local_path(run, "run")
    if not workdir.holds_run(folder):
        raise InputError(f"{folder} holds no run: name the --workdir of one")
    config = workdir.read_record(folder)["config"]
    if by not in (LAST, MEAN):
        raise InputError(f"by must be {LAST} or {MEAN}, got {by!r}")
    with records.parsing(folder / workdir.CONFIG_FILE, "repair it"):
        is_uniform = config["proposal"]["name"] == "uniform"
    if is_uniform:
        raise InputError(f"{folder} drew uniformly and has no scores: train with another --config.proposal.name")
    stores = last_scores(folder) if by == LAST else checkpointed_scores(folder)
    score, scored_at = _mean(list(stores.values()))
    known = int((scored_at != NEVER).sum())
    if not known:
        raise InputError(f"no example of {folder} has a score yet: wait for the first round of scoring")
    if not 1 <= k <= known:
        raise InputError(f"k must be between 1 and {known:,}, the examples that have a score, got {k:,}")
    order = np.argsort(np.where(scored_at == NEVER, np.inf, -score), kind="stable")[:k]
    dataset = examples.load(folder, len(score), data_dir)
    images, labels = (dataset.images[order], dataset.labels[order]) if dataset else (None, None)
    ages = max(stores) - scored_at[order].astype(np.int64)
    return Hardest(order, score[order], ages, labels, images, len(score), tuple(sorted(stores)))


def grid(found: Hardest) -> Figure:
    """Draws the examples, each with its index, label and score.

    Raises:
      InputError: there are more than MAX_IMAGES, or they are no images.
    """
    if found.images is None:
        raise InputError("the examples are of a problem of your own: draw them by their indices")
    count, channels = len(found.images), found.images.shape[-1]
    if count > MAX_IMAGES:
        raise InputError(f"k must be <= {MAX_IMAGES} to be drawn, got {count:,}")
    if channels not in (1, 3, 4):
        raise InputError(f"images must have 1, 3 or 4 channels to be drawn, got {channels}")
    columns = min(count, 10)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(1.2 * columns, 1.55 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, image, index, label, score in zip(axes, found.images, found.indices, found.labels, found.scores):
        # Grey levels of the image itself: those of digits end at 16, not 255.
        axis.imshow(image.squeeze(-1) if channels == 1 else image, cmap="gray", interpolation="nearest")
        axis.set_title(f"label {label}\n{score:.3g}, #{index}", fontsize=8)
    return figure


def last_scores(folder: pathlib.Path) -> dict[int, ScoreStore]:
    """Returns {step: scores} at the end of the run."""
    path = folder / workdir.SCORES_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no {workdir.SCORES_FILE} yet, which a run writes at its end: wait for it, or use --by={MEAN}"
        )
    store = ScoreStore.load(path)
    newest = int(np.asarray(store.scored_at).max())
    return {max(workdir.last_step(folder) or 0, newest): store}


def checkpointed_scores(folder: pathlib.Path) -> dict[int, ScoreStore]:
    """Returns {step: scores} of the checkpoints; those that are damaged, or removed meanwhile, are left out."""
    stores, checkpoints = {}, folder / workdir.CHECKPOINTS
    for step in checkpoint.steps_in(checkpoints):
        path = checkpoint.path_of(checkpoints, step)
        try:
            arrays = checkpoint.read(path).arrays
        except (checkpoint.DamagedError, InputError) as error:
            if isinstance(error, checkpoint.DamagedError) or not path.exists():
                continue
            raise
        if _STORE[0] in arrays and _STORE[1] in arrays:
            stores[step] = ScoreStore(*(np.asarray(arrays[name]) for name in _STORE))
    if not stores:
        raise InputError(f"{folder} has no checkpoint with scores: wait for the first, or use --by={LAST}")
    return stores


def _mean(stores: list[ScoreStore]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of each example's scores where it has one, f64[N], and the step of its last, -1 without any."""
    score, scored_at = (np.stack([np.asarray(getattr(store, name)) for store in stores]) for name in _FIELDS)
    is_known = scored_at != NEVER
    mean = np.where(is_known, score, 0).sum(0, dtype=np.float64) / np.maximum(is_known.sum(0), 1)
    return mean, scored_at.max(0)

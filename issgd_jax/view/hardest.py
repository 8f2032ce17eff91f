"""The examples of a run with the largest scores: a hint for wrong labels, and what training is about."""

import dataclasses
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure

from issgd_jax import records
from issgd_jax.errors import InputError
from issgd_jax.paths import local_path
from issgd_jax.run import workdir
from issgd_jax.view import examples, snapshots
from issgd_jax.view.snapshots import Snapshot

# Pictures in a grid that a person can still look through.
MAX_IMAGES = 400
# Which scores count: those at the end of a run, or the mean over its checkpoints.
LAST, MEAN = "last", "mean"


@dataclasses.dataclass(frozen=True)
class Hardest:
    """The examples with the largest scores, the largest first.

    Attributes:
      indices: i64[k], into the training data.
      scores: f64[k].
      staleness: i64[k], learner steps from the parameters that gave a score to the last of `steps`; of a mean, from
        those that gave its newest.
      times_drawn: i32[k], how often each was in a minibatch; None: an earlier version did not count.
      labels: i32[k]; None: the problem is not one of images that the config names.
      images: uint8[k, H, W, channels]; None likewise.
      num_examples: N.
      steps: of which scores were read; more than one for a mean.
    """

    indices: np.ndarray
    scores: np.ndarray
    staleness: np.ndarray
    times_drawn: np.ndarray | None
    labels: np.ndarray | None
    images: np.ndarray | None
    num_examples: int
    steps: tuple[int, ...]

    def __str__(self):
        by = f"score of step {self.steps[-1]:,}"
        if len(self.steps) > 1:
            by = f"mean score of {len(self.steps)} steps, {self.steps[0]:,} to {self.steps[-1]:,}"
        unknown = ["-"] * len(self.indices)
        columns = (
            self.indices,
            unknown if self.labels is None else self.labels,
            [f"{score:.4g}" for score in self.scores],
            [f"{staleness:,}" for staleness in self.staleness],
            unknown if self.times_drawn is None else [f"{times:,}" for times in self.times_drawn],
        )
        rows = (f"{a:>9}{b!s:>7}{c:>12}{d:>11}{e:>7}" for a, b, c, d, e in zip(*columns))
        return "\n".join(
            [
                f"{len(self.indices):,} of {self.num_examples:,} examples with the largest {by}",
                f"{'index':>9}{'label':>7}{'score':>12}{'staleness':>11}{'drawn':>7}",
                *rows,
                *self._commonest(),
            ]
        )

    def _commonest(self) -> list[str]:
        """Returns a line about the class with most of the examples."""
        if self.labels is None:
            return []
        counts = np.bincount(self.labels)
        if counts.max() == 1:
            return []
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
    workdir.check_run(folder)
    config = workdir.read_record(folder)["config"]
    if by not in (LAST, MEAN):
        raise InputError(f"by must be {LAST} or {MEAN}, got {by!r}")
    with records.parsing(folder / workdir.CONFIG_FILE, "repair it"):
        is_uniform = config["proposal"]["name"] == "uniform"
    if is_uniform:
        raise InputError(f"{folder} drew uniformly and has no scores: train with another --config.proposal.name")
    found = [snapshots.at_end(folder)] if by == LAST else snapshots.in_checkpoints(folder)
    seen = _mean(found)
    known = int(seen.scored.sum())
    if not known:
        raise InputError(f"no example of {folder} has a score yet: wait for the first round of scoring")
    if not 1 <= k <= known:
        raise InputError(f"k must be between 1 and {known:,}, the examples that have a score, got {k:,}")
    order = np.argsort(np.where(seen.scored, -seen.score, np.inf), kind="stable")[:k]
    dataset = examples.load(folder, len(seen.score), data_dir)
    return Hardest(
        indices=order,
        scores=seen.score[order],
        staleness=seen.staleness[order],
        times_drawn=None if seen.times_drawn is None else seen.times_drawn[order],
        labels=dataset.labels[order] if dataset else None,
        images=dataset.images[order] if dataset else None,
        num_examples=len(seen.score),
        steps=tuple(snapshot.step for snapshot in found),
    )


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


def _mean(found: list[Snapshot]) -> Snapshot:
    """Returns, as of the last, the mean of each example's scores where it has one, and the step of its newest."""
    scored = np.stack([snapshot.scored for snapshot in found])
    sums = np.where(scored, np.stack([snapshot.score for snapshot in found]), 0).sum(0)
    scored_at = np.stack([snapshot.scored_at for snapshot in found]).max(0)
    return dataclasses.replace(found[-1], score=sums / np.maximum(scored.sum(0), 1), scored_at=scored_at)

"""Scores of a run at one step, from its file of scores or from its checkpoints."""

import dataclasses
import pathlib

import numpy as np

from issgd_jax.errors import InputError
from issgd_jax.run import checkpoint, workdir
from issgd_jax.sampling.store import NEVER, ScoreStore

_PREFIX = "sampler_state."


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Scores of a run at one step, on the host.

    Attributes:
      step: learner step.
      score: f64[N], 0 where an example was never scored.
      scored_at: i64[N], step of the parameters that gave the score; -1 where never scored.
      times_drawn: i32[N], how often an example was in a minibatch so far, of a run that an earlier version began since
        it was resumed; None: an earlier version wrote the file.
    """

    step: int
    score: np.ndarray
    scored_at: np.ndarray
    times_drawn: np.ndarray | None

    @property
    def scored(self) -> np.ndarray:
        """bool[N], where an example has a score."""
        return self.scored_at != NEVER

    @property
    def staleness(self) -> np.ndarray:
        """i64[N], learner steps since the parameters that gave the score."""
        return self.step - self.scored_at


def at_end(folder: pathlib.Path) -> Snapshot:
    """Returns the scores with which a run ended.

    Raises:
      InputError: there are none yet, or the file is damaged.
    """
    path = folder / workdir.SCORES_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no {workdir.SCORES_FILE} yet, which a run writes at its end: wait for it, or use the scores "
            "of its checkpoints (--by=mean)"
        )
    store = ScoreStore.load(path)
    try:
        with np.load(path) as arrays:
            times_drawn = arrays.get("times_drawn")
    except Exception as error:  # a damaged archive raises many types
        raise InputError(f"{path} is damaged ({error!r}): restore it from a copy") from error
    newest = int(np.asarray(store.scored_at).max())
    return _snapshot(path, max(workdir.last_step(folder) or 0, newest), store.score, store.scored_at, times_drawn)


def in_checkpoints(folder: pathlib.Path) -> list[Snapshot]:
    """Returns the scores in each checkpoint of a run, at least one, the oldest first; damaged ones are left out.

    Raises:
      InputError: there is none with scores, or one cannot be read.
    """
    found, checkpoints = [], folder / workdir.CHECKPOINTS
    for step in checkpoint.steps_in(checkpoints):
        path = checkpoint.path_of(checkpoints, step)
        try:
            arrays = checkpoint.read(path).arrays
        except (checkpoint.DamagedError, InputError) as error:
            if isinstance(error, checkpoint.DamagedError) or not path.exists():  # removed meanwhile
                continue
            raise
        score, scored_at, times_drawn = (arrays.get(_PREFIX + name) for name in ("score", "scored_at", "times_drawn"))
        if score is not None and scored_at is not None:
            found.append(_snapshot(path, step, score, scored_at, times_drawn))
    if not found:
        raise InputError(f"{folder} has no checkpoint with scores: wait for the first, or use --by=last")
    return found


def newest(folder: pathlib.Path) -> Snapshot:
    """Returns the scores with which a run ended, or else those of its newest checkpoint.

    Raises:
      InputError: there are neither, or they cannot be read.
    """
    if (folder / workdir.SCORES_FILE).is_file():
        return at_end(folder)
    if not checkpoint.steps_in(folder / workdir.CHECKPOINTS):
        raise InputError(f"{folder} has no {workdir.SCORES_FILE}, which a run writes at its end, and no checkpoint")
    return in_checkpoints(folder)[-1]


def _snapshot(path: pathlib.Path, step: int, score, scored_at, times_drawn) -> Snapshot:
    if times_drawn is not None and (times_drawn.shape, times_drawn.dtype) != (score.shape, np.int32):
        raise InputError(
            f"{path} holds times_drawn {times_drawn.dtype}{times_drawn.shape}: expected int32{score.shape}"
        )
    return Snapshot(step, np.asarray(score, np.float64), np.asarray(scored_at, np.int64), times_drawn)

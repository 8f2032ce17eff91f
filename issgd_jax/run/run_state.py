"""State of a run: everything it needs to resume as if it had never stopped, and its way into a checkpoint and back."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from issgd_jax.console import say
from issgd_jax.devices import one_copy, put
from issgd_jax.errors import ClusterLostError, InputError
from issgd_jax.files import sync_to_disk
from issgd_jax.learning import payoff
from issgd_jax.learning.learner import StepMetrics, StepsMetrics, TrainState
from issgd_jax.learning.variance import Moments
from issgd_jax.run.checkpoint import Checkpoint
from issgd_jax.sampling import SamplerState
from issgd_jax.scoring.schedule import Round

# Arrays that checkpoints of earlier versions lack; they begin as those of a new run.
_LATER = {"sampler_state.times_drawn"}


@dataclasses.dataclass
class RunState:
    """A run at the beginning of a step, before anything of that step is done; changed in place by the loop.

    Attributes:
      train_state, sampler_state: on the learner's device.
      payoff_state: whether examples are sampled by importance now, and what that was measured to give.
      step: steps done.
      in_flight: rounds whose scores have not entered.
      pending: (step, metrics) of the last call, not yet read: of one step, or of several from this one on, which are
        read before anything is saved.
      cursor: of the worker pool; None without one.
      rebuilt_at: the last step before which the table was rebuilt.
      worker_examples: scores that have entered.
      failed_rounds: rounds lost to an error of their device.
      skipped: updates that were not finite and were skipped.
      step_seconds: spent on steps and rounds so far, compilation included, measurements and checkpoints not.
      window_seconds: the same since the last decision of the payoff.
      began: `time.monotonic()` at which the run would have begun, had it never stopped.
    """

    train_state: TrainState
    sampler_state: SamplerState
    payoff_state: payoff.State
    step: int = 0
    in_flight: collections.deque[Round] = dataclasses.field(default_factory=collections.deque)
    pending: tuple[int, StepMetrics | StepsMetrics] | None = None
    cursor: dict[str, int] | None = None
    rebuilt_at: int = 0
    worker_examples: int = 0
    failed_rounds: int = 0
    skipped: int = 0
    step_seconds: float = 0.0
    window_seconds: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, without the time it was stopped."""
        return time.monotonic() - self.began


_COUNTERS = (
    "step",
    "cursor",
    "rebuilt_at",
    "worker_examples",
    "failed_rounds",
    "skipped",
    "step_seconds",
    "window_seconds",
)


# Form of what JSON holds of a state: integers are >= 0, lists have any length, tuples theirs.
_FORM = {
    **dict.fromkeys(_COUNTERS, 0),
    **dict.fromkeys(("step_seconds", "window_seconds", "wall_seconds"), 0.0),
    "cursor": {"item": 0, "workers": 0},
    "payoff_state": {
        "active": True,
        "left": 0,
        "idle": 0,
        "moments": (0.0, 0.0, 0.0),
        "gains": [0.0],
        "active_seconds": [0.0],
        "idle_seconds": [0.0],
    },
    "pending_step": 0,
    "metrics_bytes": 0,
    "rounds": [{"step": 0, "num_examples": 0}],
}
_OPTIONAL = ("cursor", "pending_step")
_ANY = object()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state on its devices; `read` makes a checkpoint of it.

    Attributes:
      step: steps done.
      arrays: (train_state, sampler_state), copies that are never donated.
      finite: bool[], whether the training state is.
      loss_and_moments: of the pending step; None if none is pending.
      rounds: in flight.
      described: what JSON can hold.
      metrics_path: of metrics.jsonl, whose rows must be on the disk before the checkpoint is.
      skip_nonfinite: whether the pending loss may be not finite, as such updates are skipped.
      wait_for_rounds: whether rounds in flight are waited for; else those that are not ready are left out, and their
        examples scored a sweep later.
    """

    step: int
    arrays: tuple[TrainState, SamplerState]
    finite: jax.Array
    loss_and_moments: tuple[jax.Array, Moments | None] | None
    rounds: tuple[Round, ...]
    described: dict[str, Any]
    metrics_path: pathlib.Path | None = None
    skip_nonfinite: bool = False
    wait_for_rounds: bool = True

    @classmethod
    def take(cls, state: RunState, *, metrics_bytes: int = 0, **options) -> "Snapshot":
        """Copies the state as it is now, without waiting.

        Args:
          metrics_bytes: size of metrics.jsonl now.
          options: metrics_path, skip_nonfinite, wait_for_rounds.
        """
        arrays, finite = _copied(one_copy((state.train_state, state.sampler_state)))
        described = {name: getattr(state, name) for name in _COUNTERS}
        described |= {
            "wall_seconds": state.wall_seconds,
            "payoff_state": state.payoff_state._asdict(),
            "pending_step": state.pending[0] if state.pending else None,
            "metrics_bytes": metrics_bytes,
        }
        loss_and_moments = (state.pending[1].loss, state.pending[1].moments) if state.pending else None
        return cls(state.step, arrays, finite, loss_and_moments, tuple(state.in_flight), described, **options)

    def read(self) -> Checkpoint | None:
        """Waits, and returns the checkpoint; None if the parameters or the pending loss are not finite."""
        if self.metrics_path:
            with contextlib.suppress(OSError):  # without rows of metrics the parameters are worth keeping too
                sync_to_disk(self.metrics_path)
        rounds, described = _read_rounds(r for r in self.rounds if self.wait_for_rounds or r.is_ready())
        train_state, sampler_state = self.arrays
        finite, arrays = jax.device_get((self.finite, _tree(train_state, sampler_state, self.loss_and_moments, rounds)))
        is_loss_bad = self.loss_and_moments and not self.skip_nonfinite and not np.isfinite(arrays["pending"][0])
        if not finite or is_loss_bad:
            say(f"no checkpoint of step {self.step:,}: the update before it is not finite")
            return None
        return Checkpoint(_by_path(arrays), self.described | {"rounds": described})


@jax.jit
def _copied(arrays) -> tuple[Any, jax.Array]:
    """Returns copies, and whether all numbers of the training state are finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(arrays[0]) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jax.tree.map(jnp.copy, arrays), jnp.all(jnp.array(finite))


def _read_rounds(rounds) -> tuple[list, list[dict]]:
    """Returns (indices, scores) and the other fields of each round, without those that their device failed to score."""
    arrays, described = [], []
    for round_ in rounds:
        with contextlib.suppress(jax.errors.JaxRuntimeError, ClusterLostError):  # logged when it is to enter
            arrays.append(jax.device_get((round_.indices, round_.scores)))
            described.append({"step": round_.step, "num_examples": round_.num_examples})
    return arrays, described


def check_fields(state: dict, others: Iterable[str] = ()) -> None:
    """Checks that the state of a checkpoint has the fields that `restore` needs, and no others.

    Args:
      state: as it was read.
      others: names of further fields, with any value.

    Raises:
      InputError: a field is missing, unknown or of another kind, naming it.
    """
    if difference := _difference(state, _FORM | dict.fromkeys(others, _ANY), ()):
        raise InputError(
            f"the checkpoint of step {state.get('step')} {difference}. Resume with the version that wrote it, choose "
            "another --workdir, or start again with --overwrite"
        )


def _difference(value, form, path: tuple[str, ...]) -> str | None:
    """Says in what a value that JSON can hold differs in form from another; None: in nothing."""
    name = ".".join(path)
    if form is _ANY or (value is None and name in _OPTIONAL):
        return None
    if isinstance(form, dict) and isinstance(value, dict):
        if missing := [key for key in form if key not in value]:
            return f"has no {'.'.join((*path, missing[0]))!r}: an earlier version of issgd_jax wrote it"
        if unknown := [key for key in value if key not in form]:
            return f"has the unknown field {'.'.join((*path, unknown[0]))!r}: a later version of issgd_jax wrote it"
        parts = ((value[key], form[key], (*path, key)) for key in form)
    elif isinstance(form, list) and isinstance(value, list):
        parts = ((part, form[0], (*path, str(i))) for i, part in enumerate(value))
    elif isinstance(form, tuple) and isinstance(value, list) and len(value) == len(form):
        parts = ((part, form[i], (*path, str(i))) for i, part in enumerate(value))
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_alike = is_number if isinstance(form, float) else type(value) is type(form) and value >= 0
        return None if is_alike else f"has {name} = {value!r}, where this version has {_described_form(form)}"
    return next(filter(None, (_difference(*part) for part in parts)), None)


def _described_form(form) -> str:
    """Returns what a value of this form is, in words."""
    words = {dict: "fields", list: "a list", tuple: "three numbers", int: "an integer >= 0", float: "a number"}
    return words.get(type(form), "true or false")


def restore(checkpoint: Checkpoint, fresh: RunState, placement: jax.Device | Sharding, *, moments: bool) -> RunState:
    """Returns the state that a checkpoint holds.

    Args:
      checkpoint: as `Snapshot.read` returned it.
      fresh: the state before the first step; gives the structure of the arrays.
      placement: of the learner's arrays.
      moments: whether the metrics of a step have moments.

    Raises:
      InputError: the checkpoint is of a run with other arrays, naming one.
    """
    described = checkpoint.state
    number = np.zeros((), np.float32)
    pending_step, rounds = described["pending_step"], described["rounds"]
    pending = None if pending_step is None else (number, Moments(number, number, number) if moments else None)
    template = _tree(fresh.train_state, fresh.sampler_state, pending, [(np.int32(0), number)] * len(rounds))
    expected = _by_path(template)
    earlier = {name: expected[name] for name in _LATER & expected.keys() - checkpoint.arrays.keys()}
    checkpoint = dataclasses.replace(checkpoint, arrays=checkpoint.arrays | earlier)
    _check_arrays(checkpoint, expected)
    leaves = put([checkpoint.arrays[name] for name in expected], placement)
    arrays = jax.tree.unflatten(jax.tree.structure(template), leaves)
    if pending:
        # The minibatch is needed only where the loss is not finite, and then there is no checkpoint.
        pending = (pending_step, StepMetrics(*arrays["pending"], None))
    return RunState(
        train_state=arrays["train_state"],
        sampler_state=arrays["sampler_state"],
        payoff_state=payoff.State.from_dict(described["payoff_state"]),
        in_flight=collections.deque(
            Round(scores=scores, indices=indices, **fields)
            for fields, (indices, scores) in zip(rounds, arrays["rounds"])
        ),
        pending=pending,
        began=time.monotonic() - described["wall_seconds"],
        **{name: described[name] for name in _COUNTERS},
    )


def _check_arrays(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Raises InputError unless the checkpoint has these arrays and no others; those of rounds may have any shape."""
    step = f"the checkpoint of step {checkpoint.state['step']:,}"
    remedy = (
        "The data or the network are not those it was made with, or another version wrote it: choose another "
        "--workdir, or start again with --overwrite"
    )
    for name, array in expected.items():
        saved = checkpoint.arrays.get(name)
        shape = array.shape
        if name.startswith("rounds.") and saved is not None:  # both of a round have one shape
            shape = getattr(checkpoint.arrays.get(f"{name[:-1]}0"), "shape", None)
        if saved is None or (saved.shape, saved.dtype) != (shape, array.dtype):
            has = "no such array" if saved is None else f"{saved.dtype}{saved.shape}"
            raise InputError(f"{step} has {has} where this run has {name}: {array.dtype}{shape}. {remedy}")
    if unknown := sorted(checkpoint.arrays.keys() - expected.keys()):
        raise InputError(f"{step} has the array {unknown[0]}, which this run does not have. {remedy}")


def _tree(train_state, sampler_state, pending, rounds: list) -> dict[str, Any]:
    return {"train_state": train_state, "sampler_state": sampler_state, "pending": pending, "rounds": rounds}


def _by_path(arrays) -> dict[str, Any]:
    """Returns {path: array}, in the order of the leaves."""
    paths = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}

"""Everything that a run needs to go on as if it had never stopped, and its way into a checkpoint and back."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from issgd_jax.console import say
from issgd_jax.devices import one_copy, put
from issgd_jax.errors import InputError
from issgd_jax.learning import learner, payoff
from issgd_jax.learning.variance import Moments
from issgd_jax.run.checkpoint import Checkpoint
from issgd_jax.scoring.schedule import Round


@dataclasses.dataclass
class RunState:
    """A run at the beginning of a step, before anything of that step is done.

    train_state, sampler: on the learner's device. judged: of the payoff. in_flight: rounds whose scores have not
    entered. pending: (step, its metrics), not yet read. place: of the worker pool; None without one. renewed: the last
    step before which the table was made anew. failed_rounds: rounds lost to an error of their device. skipped: updates
    that were not finite and left out. window_seconds: spent on steps since the payoff was last judged. wall_seconds:
    since the run began, without the time it was stopped.
    """

    train_state: learner.TrainState
    sampler: learner.SamplerState
    judged: payoff.State
    step: int = 0
    in_flight: collections.deque[Round] = dataclasses.field(default_factory=collections.deque)
    pending: tuple[int, learner.StepMetrics] | None = None
    place: dict[str, int] | None = None
    renewed: int = 0
    worker_examples: int = 0
    failed_rounds: int = 0
    skipped: int = 0
    window_seconds: float = 0.0
    wall_seconds: float = 0.0


_COUNTERS = (
    "step",
    "place",
    "renewed",
    "worker_examples",
    "failed_rounds",
    "skipped",
    "window_seconds",
    "wall_seconds",
)


@jax.jit
def _copied(arrays) -> tuple[Any, jax.Array]:
    """Copies, which nobody donates; and whether all numbers of the training state are finite."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(arrays[0]) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jax.tree.map(jnp.copy, arrays), jnp.all(jnp.array(finite))


def snapshot(
    state: RunState, *, skipping: bool = False, waiting: bool = True, **more
) -> Callable[[], Checkpoint | None]:
    """Holds the state as it is now, without waiting; what it returns makes the checkpoint of it, and may wait.

    There is no checkpoint of parameters that are not finite. skipping: whether the pending metrics may be, as such
    updates are left out. waiting: whether rounds in flight are waited for, or left out if they are not ready, and their
    examples scored a sweep later. more: for the checkpoint's state.
    """
    (train_state, sampler), finite = _copied(one_copy((state.train_state, state.sampler)))
    rounds, pending = list(state.in_flight), state.pending
    described = {name: getattr(state, name) for name in _COUNTERS} | more
    described |= {"judged": state.judged._asdict(), "pending_step": pending[0] if pending else None}
    read = (pending[1].loss, pending[1].moments) if pending else None

    def make() -> Checkpoint | None:
        of_rounds, about = _read([round_ for round_ in rounds if waiting or round_.is_ready()])
        is_finite, arrays = jax.device_get((finite, _arrays(train_state, sampler, read, of_rounds)))
        if not is_finite or (read and not skipping and not np.isfinite(arrays["pending"][0])):
            say(f"no checkpoint of step {described['step']:,}: the update before it is not finite")
            return None
        return Checkpoint(_named(arrays), described | {"rounds": about})

    return make


def _read(rounds: list[Round]) -> tuple[list, list[dict]]:
    """(indices, scores) and what else there is of each round, but for those that their device failed to score."""
    arrays, about = [], []
    for round_ in rounds:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told of when it is to enter
            arrays.append(jax.device_get((round_.indices, round_.scores)))
            about.append({"step": round_.step, "num_examples": round_.num_examples})
    return arrays, about


def restore(checkpoint: Checkpoint, fresh: RunState, placement: jax.Device | Sharding, *, moments: bool) -> RunState:
    """The state that a checkpoint is of.

    fresh: the state that the run begins with. placement: of the learner's arrays. moments: whether the
    metrics of a step have them.

    Raises: InputError if the checkpoint is of a run with other arrays, naming one, or of an earlier version.
    """
    described = checkpoint.state
    if unknown := [name for name in _COUNTERS if name not in described]:
        raise InputError(
            f"the checkpoint of step {described['step']:,} says nothing of {unknown[0]!r}: an earlier version of "
            "issgd_jax made it. Go on with that version, choose another --workdir, or begin anew with --overwrite"
        )
    numbers = np.zeros((), np.float32)
    pending_step, rounds = described["pending_step"], described["rounds"]
    read = None if pending_step is None else (numbers, Moments(numbers, numbers, numbers) if moments else None)
    template = _arrays(fresh.train_state, fresh.sampler, read, [(numbers, numbers)] * len(rounds))
    expected = _named(template)
    for name, array in expected.items():
        found = checkpoint.arrays.get(name)
        of_any_shape = name.startswith("rounds.")
        if found is None or not (of_any_shape or (found.shape, found.dtype) == (array.shape, array.dtype)):
            has = "no such array" if found is None else f"{found.dtype}{found.shape}"
            raise InputError(
                f"the checkpoint of step {described['step']:,} has {has} where this run has {name}: "
                f"{array.dtype}{array.shape}. The data or the network are not those it was made with: choose another "
                "--workdir, or begin anew with --overwrite"
            )
    leaves = put([checkpoint.arrays[name] for name in expected], placement)
    arrays = jax.tree.unflatten(jax.tree.structure(template), leaves)
    pending = None
    if read:
        loss, found_moments = arrays["pending"]
        # The minibatch is needed only where the loss is not finite, and of such a step there is no checkpoint.
        pending = (pending_step, learner.StepMetrics(loss, found_moments, None))
    return RunState(
        train_state=arrays["train_state"],
        sampler=arrays["sampler"],
        judged=payoff.State.of(described["judged"]),
        in_flight=collections.deque(
            Round(scores=scores, indices=indices, **about) for about, (indices, scores) in zip(rounds, arrays["rounds"])
        ),
        pending=pending,
        **{name: described[name] for name in _COUNTERS},
    )


def _arrays(train_state, sampler, pending, rounds: list) -> dict[str, Any]:
    return {"train_state": train_state, "sampler": sampler, "pending": pending, "rounds": rounds}


def _named(arrays) -> dict[str, Any]:
    """{path: array}, in the order of the leaves."""
    paths = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}

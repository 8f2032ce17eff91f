"""Parameters on their way out, and rounds of scoring on their way back, which the learner may wait for."""

import asyncio
import concurrent.futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.cluster.leases import Layout

_copied = jax.jit(lambda params: jax.tree.map(jnp.copy, params))


class Broadcast:
    """A copy of the parameters of one step, which the caller may then donate.

    params: None once they are in Ray's store. reference: Ray's of them; None = not yet asked for. num_served: leases
    that were begun with them. workers: names of those that have fetched them.
    """

    def __init__(self, step: int, params):
        self.step, self.params, self.num_served = step, _copied(params), 0
        self.num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self.reference: asyncio.Future | None = None
        self.workers: set[str] = set()


class _Scored(NamedTuple):
    step: int
    indices: np.ndarray
    scores: np.ndarray


class LeasedRound:
    """A `schedule.Round` that comes from a cluster: some leases, scored with the parameters of one step.

    Reading what is not ready yet waits for it.
    """

    def __init__(self, leases: range, broadcast: Broadcast | None, layout: Layout):
        """broadcast: whose scores are wanted; None = of the newest parameters when the lease begins."""
        self.leases, self.broadcast = leases, broadcast
        self.num_examples = len(leases) * layout.chunk_size
        self._layout, self._found = layout, {}
        self._scored: concurrent.futures.Future[_Scored] = concurrent.futures.Future()

    def is_ready(self) -> bool:
        return self._scored.done()

    @property
    def step(self) -> int:
        return self.broadcast.step if self.broadcast else self._scored.result().step

    @property
    def indices(self) -> np.ndarray:
        return self._scored.result().indices

    @property
    def scores(self) -> np.ndarray:
        return self._scored.result().scores

    def fill(self, lease: int, step: int, scores: np.ndarray) -> None:
        """The first, and only, result of one of its leases."""
        self._found[lease] = scores
        if len(self._found) == len(self.leases):
            indices = np.concatenate([self._layout.examples(number) for number in self.leases])
            all_scores = np.concatenate([self._found[number] for number in self.leases])
            self._scored.set_result(_Scored(step, indices, all_scores))

    def fail(self, error: BaseException) -> None:
        """Nobody will score it any more."""
        if not self._scored.done():
            self._scored.set_exception(error)

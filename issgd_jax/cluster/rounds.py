"""Broadcasts of parameters to the workers, and rounds of scores from them, which the learner may wait for."""

import concurrent.futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.cluster.channel import Packed, pack
from issgd_jax.cluster.leases import Layout

_copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))


class Broadcast:
    """Copy of the parameters of one step; the caller may donate the original.

    Args:
      step: learner step of the parameters.
      params: pytree of arrays.

    Attributes:
      is_served: whether every worker has been given them.

    Example:
      >>> broadcast = Broadcast(3, {"kernel": jnp.zeros((2, 5))})
      >>> from issgd_jax.cluster.channel import unpack
      >>> unpack(broadcast.pack())["kernel"].shape
      (2, 5)
    """

    def __init__(self, step: int, params):
        self.step, self.is_served = step, False
        self._params, self._packed = _copy(params), None

    def pack(self) -> Packed:
        """Returns the parameters on the host; waits for them, and gives the copy on the devices up."""
        if self._packed is None:
            self._packed = pack(jax.device_get(self._params))
            self._params = None
        return self._packed


class _Scored(NamedTuple):
    step: int
    indices: np.ndarray
    scores: np.ndarray


class LeasedRound:
    """A `schedule.Round` whose leases are scored by a cluster. `step`, `indices` and `scores` block until it is ready.

    Args:
      leases: numbers of its leases.
      broadcast: parameters to score with; None: the newest when each lease begins.
      layout: partition of the examples.

    Attributes:
      num_examples: how many are scored.
      step: learner step of the parameters.
      indices: i32[num_examples].
      scores: f32[num_examples].

    Example:
      >>> round_ = LeasedRound(range(2), None, Layout(num_examples=6, num_shards=2, chunk_size=2))
      >>> round_.add_scores(1, step=7, scores=np.array([3.0, 4.0], np.float32))
      >>> round_.is_ready()
      False
      >>> round_.add_scores(0, step=7, scores=np.array([1.0, 2.0], np.float32))
      >>> round_.step, round_.indices.tolist(), round_.scores.tolist()
      (7, [0, 1, 3, 4], [1.0, 2.0, 3.0, 4.0])
    """

    def __init__(self, leases: range, broadcast: Broadcast | None, layout: Layout):
        self.leases, self.broadcast = leases, broadcast
        self.num_examples = len(leases) * layout.chunk_size
        self._layout = layout
        self._chunks: dict[int, np.ndarray] = {}  # scores of each lease
        self._scored: concurrent.futures.Future[_Scored] = concurrent.futures.Future()

    def is_ready(self) -> bool:
        """Returns whether the scores can be read without waiting."""
        return self._scored.done()

    @property
    def missing(self) -> list[int]:
        """Leases without scores."""
        return [lease for lease in self.leases if lease not in self._chunks]

    @property
    def step(self) -> int:
        return self.broadcast.step if self.broadcast else self._scored.result().step

    @property
    def indices(self) -> np.ndarray:
        return self._scored.result().indices

    @property
    def scores(self) -> np.ndarray:
        return self._scored.result().scores

    def add_scores(self, lease: int, step: int, scores: np.ndarray) -> None:
        """Adds the scores of one lease, once for each.

        Args:
          lease: one of `leases`.
          step: learner step of the parameters that gave the scores.
          scores: f32[chunk_size].
        """
        self._chunks[lease] = scores
        if len(self._chunks) == len(self.leases):
            indices = np.concatenate([self._layout.examples(number) for number in self.leases])
            self._scored.set_result(_Scored(step, indices, np.concatenate([self._chunks[i] for i in self.leases])))

    def fail(self, error: BaseException) -> None:
        """Makes every reader of an unfinished round raise this error."""
        if not self._scored.done():
            self._scored.set_exception(error)

"""Parts of a run: built once from the config, never changed by the loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Sharding

from issgd_jax.learning.learner import TrainState
from issgd_jax.learning.payoff import Payoff
from issgd_jax.sampling import Sampler, SamplerState


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts of a run; arrays are on the learner's device, or whole on each of its devices, of all processes.

    Attributes:
      train_state, sampler_state: before the first step.
      sampler: the draw.
      train_step: see `learning.learner.Learner.compile`.
      train_steps: see `learning.learner.Learner.compile_steps`; None where steps are done one by one.
      train_examples: pytrees with leading axis N.
      measure: `(params, sampler_state) -> {metric: number}`, on the learner's first device.
      pool: of workers, see `scoring.workers.WorkerPool`; None without workers.
      broadcast: `train_state -> pytree`, what workers score with: the parameters, and the step where losses take keys.
      schedule: of rounds, see `scoring.schedule`.
      window: steps between rebuilds of the table, unless rounds rebuild it; and between decisions of the payoff.
      are_norms: whether workers' scores are gradient norms.
      payoff: decides when to sample by importance; None: always.
      learner_device: the learner's first device.
      placement: where the learner's arrays are.
      agree: `int -> int`, the largest of the numbers that processes pass, see `processes.agreement`.
      batch_size: examples in a minibatch of all learner devices.
    """

    train_state: TrainState
    sampler_state: SamplerState
    sampler: Sampler
    train_step: Callable
    train_steps: Callable | None
    train_examples: Any
    measure: Callable
    pool: Any | None
    broadcast: Callable[[TrainState], Any]
    schedule: Any
    window: int
    are_norms: bool
    payoff: Payoff | None
    learner_device: jax.Device
    placement: jax.Device | Sharding
    agree: Callable[[int], int]
    batch_size: int

"""Several seeds and learning rates of one experiment in one compiled program, on all devices.

The relaxed schedule of `issgd_jax.run.loop` without its host: all rounds between two measurements are one program,
which is vmapped over the replicas. The devices share the replicas, and each is learner and worker of its own. W workers
with chunks of C are one worker with chunks of W * C.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax.errors import InputError
from issgd_jax.learning.asgd import exchange
from issgd_jax.learning.learner import TrainState
from issgd_jax.run import wiring
from issgd_jax.run.measure import make_measure, to_row
from issgd_jax.sampling import Draw, SamplerState
from issgd_jax.sampling.draws import STRIDE
from issgd_jax.sampling.transitions import is_early
from issgd_jax.scoring import schedule
from issgd_jax.task import images
from issgd_jax.task import problem as problem_lib
from issgd_jax.vmapped import for_any


class Replica(NamedTuple):
    """State of one run.

    Attributes:
      train_state: its `in_flight` has no gradients, but what they are computed from (`_InFlight`).
      sampler_state: see `issgd_jax.Sampler`.
      queue: f32[rounds in flight, chunk], scores that have not entered, oldest first; None without workers.
      learning_rate: f32[].
    """

    train_state: TrainState
    sampler_state: SamplerState
    queue: jax.Array | None
    learning_rate: jax.Array


class _InFlight(NamedTuple):
    """Minibatches drawn by asynchronous learners, and the parameters at that time; a ring, see `asgd.exchange`.

    Their gradients are computed when they are applied: a single program has no use for them earlier.
    """

    params: Any
    step: jax.Array
    drawn: Draw


def train_replicas(
    config: ConfigDict, replicas: Sequence[tuple[int, float]], *, devices: Sequence[jax.Device] | None = None
) -> Iterator[list[dict]]:
    """Trains replicas of a config that differ in seed and learning rate, and yields rows of metrics.

    Args:
      config: of all replicas.
      replicas: (seed, learning rate) of each.
      devices: to share them; None: all local devices.

    Yields:
      One row of metrics for each replica, at each measurement. They are the rows of `issgd_jax.train`, but for rounding
      and the columns of time and memory. After divergence a replica continues, and its metrics are NaN.

    Raises:
      InputError: the config is not valid, or can only be trained by `issgd_jax.train`.
    """
    config_lib.validate(config)
    check(config)
    problem = images.make_problem(config)
    devices = tuple(devices or jax.local_devices())[: len(replicas)]
    program = _Program(config, problem)

    mesh = Mesh(np.asarray(devices), ("device",))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("device"))
    examples, test_examples = jax.device_put((problem.examples("train"), problem.examples("test")), replicated)

    # Where replicas do not divide evenly, copies of the last one fill the devices; their rows are discarded.
    per_device = -(-len(replicas) // len(devices))
    padded = [*replicas, *[replicas[-1]] * (per_device * len(devices) - len(replicas))]
    seeds, rates = (np.asarray(x).reshape(len(devices), per_device) for x in zip(*padded))
    seeds, rates = jax.device_put((seeds.astype(np.uint32), rates.astype(np.float32)), sharded)

    def on_all(function, num_shared=0, **options):
        axes = (0, 0) if num_shared == 0 else (0, *[None] * num_shared)
        return jax.pmap(jax.vmap(function, axes), in_axes=axes, devices=devices, **options)

    start_round = on_all(program.start_round, 2, donate_argnums=0)
    measure = on_all(program.measure, 2)
    advance = on_all(program.advance, 2, donate_argnums=0)

    def rows(step, measured):
        measured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(measured))
        counts = program.count(step)
        return [counts | to_row({name: x[i] for name, x in measured.items()}) for i in range(len(replicas))]

    state = on_all(program.init)(seeds, rates)
    for step in range(0, config.steps, config.eval_every):
        round_ = jax.device_put(np.int32(step // config.schedule.steps_per_round), replicated)
        state = start_round(state, round_, examples)
        measured = measure(state, examples, test_examples)
        state = advance(state, round_, examples)
        yield rows(step, measured)
    yield rows(config.steps, measure(state, examples, test_examples))


def replica_bytes(config: ConfigDict) -> int:
    """Estimates the memory of one replica: parameters, momentum, gradient, snapshot; sampler; a microbatch."""
    problem = images.make_problem(config)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    image = problem.examples("train")[0][0].size
    batch = max(config.learner.batch_size, problem_lib.SCORING_MICROBATCH)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    return 4 * (
        (5 + config.learner.asynchronous) * num_params
        + 12 * problem.source("train").num_examples
        + 8 * batch * (image + num_params // image)
    )


def check(config: ConfigDict) -> None:
    """Checks that replicas of the config can be trained.

    Raises:
      InputError: it can only be trained by `issgd_jax.train`.
    """
    if (config.schedule.name, config.proposal.when) != ("relaxed", "on"):
        raise InputError(
            f"replicas are trained by the relaxed schedule with proposal.when on, got {config.schedule.name} and "
            f"{config.proposal.when}: train one at a time"
        )
    if config.problem is not None:
        raise InputError(f"replicas learn the config's data and model, got problem {config.problem!r}: leave it out")
    if config.eval_every % config.schedule.steps_per_round or config.steps % config.eval_every:
        raise InputError(
            f"replicas are measured between rounds: eval_every {config.eval_every} must be a multiple of "
            f"steps_per_round {config.schedule.steps_per_round} and divide steps {config.steps}"
        )
    if config.devices.workers not in (None, 1):
        raise InputError(f"replicas have one worker, got {config.devices.workers}: enlarge its chunk_size instead")


class _Program:
    """Pure functions of one replica. Rounds are numbered 0, 1, ...; i32[] on the device."""

    def __init__(self, config: ConfigDict, problem: problem_lib.Problem):
        self._config, self._problem = config, problem
        self._num_examples = problem.source("train").num_examples
        self._schedule = schedule.Relaxed(config.schedule.steps_per_round, config.schedule.score_delay)
        self._has_scores = config_lib.samples_by_importance(config)
        self._has_workers = config.workers.enabled and self._has_scores
        if self._has_workers and config.workers.chunk_size > self._num_examples:
            raise InputError(f"workers.chunk_size must be <= {self._num_examples}, got {config.workers.chunk_size}")
        # Updates between the parameters of a gradient and its own update.
        self._gradient_delay = config.learner.asynchronous - 1
        self._sampler = wiring.make_sampler(config, self._num_examples)
        self._score_fn = problem_lib.make_score_fn(config, problem)
        self._measure = make_measure(config, problem, self._sampler)

    def count(self, step: int) -> dict[str, int]:
        """Returns the counters of a row of metrics; no scores enter after the last step."""
        num_rounds = self._schedule.num_entered(min(step, self._config.steps - 1)) if self._has_workers else 0
        return {
            "step": step,
            "learner_examples": step * problem_lib.minibatch_size(self._config),
            "worker_examples": num_rounds * self._config.workers.chunk_size,
        }

    def init(self, seed: jax.Array, learning_rate: jax.Array) -> Replica:
        """Returns the state before the first round."""
        params = self._problem.init(jax.random.key(seed))
        state = TrainState.init(params, wiring.make_optimizer(self._config, learning_rate))
        rounds_late, _ = self._schedule.delay
        queue = jnp.zeros((rounds_late + 1, self._config.workers.chunk_size)) if self._has_workers else None
        return Replica(*self._start_learners(state, self._sampler.init(seed)), queue, learning_rate)

    def start_round(self, replica: Replica, round_: jax.Array, examples) -> Replica:
        """Scores the chunk of a round, ingests the scores that enter before its first step, or rebuilds the table."""
        if self._has_workers:
            items = jax.tree.map(lambda x: x[self._chunk(round_)], examples)
            scores = self._score_fn(replica.train_state.params, *items)
            replica = replica._replace(queue=jnp.concatenate([replica.queue[1:], scores[None]]))
        if not self._has_scores:
            return replica
        replica = self._rebuild(replica, round_)
        _, steps_late = self._schedule.delay
        return self._ingest(replica, round_) if self._has_workers and not steps_late else replica

    def measure(self, replica: Replica, examples, test_examples) -> dict[str, jax.Array]:
        """Returns the metrics before the next step."""
        return self._measure(replica.train_state.params, replica.sampler_state, examples, test_examples)

    def advance(self, replica: Replica, first_round: jax.Array, examples) -> Replica:
        """Trains up to the next measurement, from a round that has been started."""

        def run_round(replica, round_):
            start = functools.partial(self.start_round, round_=round_, examples=examples)
            replica = jax.lax.cond(round_ == first_round, lambda replica: replica, start, replica)
            return self._run_steps(replica, round_, examples), None

        num_rounds = self._config.eval_every // self._schedule.steps_per_round
        replica, _ = jax.lax.scan(run_round, replica, first_round + jnp.arange(num_rounds, dtype=jnp.int32))
        return replica

    def _rebuild(self, replica: Replica, round_: jax.Array) -> Replica:
        """Rebuilds the table unless rounds enter, which do so."""
        none_enter = not self._has_workers or round_ * self._schedule.steps_per_round < self._schedule.score_delay
        state = jax.lax.cond(none_enter, self._sampler.rebuild, lambda state: state, replica.sampler_state)
        return replica._replace(sampler_state=state)

    def _run_steps(self, replica: Replica, round_: jax.Array, examples) -> Replica:
        """Takes the learner's steps of one round; scores may enter between two of them."""
        _, steps_late = self._schedule.delay
        if not (self._has_workers and steps_late):
            return self._learn(replica, self._schedule.steps_per_round, examples)
        replica = self._ingest(self._learn(replica, steps_late, examples), round_)
        return self._learn(replica, self._schedule.steps_per_round - steps_late, examples)

    def _ingest(self, replica: Replica, round_: jax.Array) -> Replica:
        """Ingests the oldest scores of the queue, if there are any."""
        rounds_late, _ = self._schedule.delay
        scored_round = round_ - rounds_late

        def ingest(state: SamplerState) -> SamplerState:
            return self._sampler.ingest(
                state,
                self._chunk(scored_round),
                replica.queue[0],
                scored_round * self._schedule.steps_per_round,
                are_norms=self._config.workers.score == "gradient_norm",
            )

        state = jax.lax.cond(scored_round >= 0, ingest, lambda state: state, replica.sampler_state)
        return replica._replace(sampler_state=state)

    def _chunk(self, round_: jax.Array) -> jax.Array:
        """Returns the examples of a round, i32[chunk]."""
        chunk_size, num_examples = self._config.workers.chunk_size, self._num_examples
        starts = schedule.chunk_starts(chunk_size, num_examples)
        return schedule.chunk_items(jnp.asarray(starts)[round_ % len(starts)], chunk_size, num_examples)

    def _start_learners(self, state: TrainState, sampler_state: SamplerState) -> tuple[TrainState, SamplerState]:
        """Draws the minibatches of all asynchronous learners but one, at the first parameters."""
        delay = self._gradient_delay
        if not delay:
            return state, sampler_state
        sampler_state, drawn = jax.lax.scan(lambda state, _: self._sampler.draw(state), sampler_state, length=delay)
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (delay, *x.shape)), (state.params, state.step))
        return state._replace(in_flight=_InFlight(*copies, drawn)), sampler_state

    def _learn(self, replica: Replica, num_steps: int, examples) -> Replica:
        optimizer = wiring.make_optimizer(self._config, replica.learning_rate)
        learner = wiring.make_learner(self._config, self._problem, optimizer)

        def step(states, _):
            state, sampler_state = states
            sampler_state, drawn = self._sampler.draw(sampler_state)
            begun = _InFlight(state.params, state.step, drawn)
            oldest, in_flight = exchange(state.in_flight, begun, state.step, delay=self._gradient_delay)
            gradient = learner.gradient(*oldest, examples)
            state, sampler_state, _ = learner.update(state, sampler_state, self._sampler, gradient)
            if self._sampler.draw_method == STRIDE:  # the early rebuilds of `Rounds`
                rebuild = self._sampler.rebuild
                is_due = for_any(is_early(state.step))
                sampler_state = jax.lax.cond(is_due, rebuild, lambda state: state, sampler_state)
            return (state._replace(in_flight=in_flight), sampler_state), None

        states, _ = jax.lax.scan(step, (replica.train_state, replica.sampler_state), length=num_steps)
        return replica._replace(train_state=states[0], sampler_state=states[1])

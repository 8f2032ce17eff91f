"""Several seeds and learning rates of one experiment in one compiled program, on whatever devices there are.

The relaxed schedule of `issgd_jax.loop` without its host: the rounds of a whole stretch between two measurements are
compiled, and vmapped over the replicas, which the devices share. Each device plays learner and worker for its
replicas; W workers with chunks of C are one with chunks of W * C.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax import sampling
from issgd_jax.errors import InputError
from issgd_jax.learning import learner
from issgd_jax.run import wiring
from issgd_jax.task import problem as problem_lib


class Replica(NamedTuple):
    """One run. queue: f32[rounds in flight, chunk], scores on their way, oldest first; None without workers.

    Of what asynchronous learners have in flight the train state has no gradients, but what they are made of.
    """

    train_state: learner.TrainState
    sampler: learner.SamplerState
    queue: jax.Array | None
    seed: jax.Array
    learning_rate: jax.Array


def train_replicas(
    config: ConfigDict, replicas: Sequence[tuple[int, float]], *, devices: Sequence[jax.Device] | None = None
) -> Iterator[list[dict]]:
    """Trains the config with each of the (seed, learning rate) pairs; yields one row of metrics a replica as they come.

    The rows are those of `issgd_jax.train` but for rounding and the columns that tell of time. A replica whose loss is
    no longer finite goes on; what it then measures is NaN.

    Raises: InputError for what only `issgd_jax.train` can do, and as that.
    """
    config_lib.validate(config)
    check(config)
    problem = problem_lib.make_problem(config)
    devices = tuple(devices or jax.local_devices())[: len(replicas)]
    program = _Program(config, problem)

    mesh = Mesh(np.asarray(devices), ("device",))
    everywhere, shared_out = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("device"))
    train_data, test_data = problem.train_data, problem.test_data
    examples = jax.device_put((train_data.images, train_data.labels), everywhere)
    test_examples = jax.device_put((test_data.images, test_data.labels), everywhere)

    # Places left over are filled with copies of the last replica, whose rows nobody reads.
    each = -(-len(replicas) // len(devices))
    filled = [*replicas, *[replicas[-1]] * (each * len(devices) - len(replicas))]
    seeds, rates = (np.asarray(x).reshape(len(devices), each) for x in zip(*filled))
    seeds, rates = jax.device_put((seeds.astype(np.uint32), rates.astype(np.float32)), shared_out)

    on_all = functools.partial(jax.pmap, devices=devices)
    state = on_all(jax.vmap(program.start))(seeds, rates)
    axes = {"in_axes": (0, None, None, None)}
    advance = on_all(jax.vmap(program.advance, **axes), **axes, donate_argnums=0)
    measure = on_all(jax.vmap(program.measure, **axes), **axes)

    def rows(step, measured):
        measured = jax.tree.map(lambda x: x.reshape(-1), jax.device_get(measured))
        counted = {
            "step": step,
            "learner_examples": step * problem_lib.minibatch_size(config),
            "worker_examples": program.num_scored(step),
        }
        return [counted | wiring.to_row({k: x[i] for k, x in measured.items()}) for i in range(len(replicas))]

    for step in range(0, config.steps, config.eval_every):
        first_round = jax.device_put(np.int32(step // program.steps_per_round), everywhere)
        state, measured = advance(state, first_round, examples, test_examples)
        yield rows(step, measured)
    last_round = jax.device_put(np.int32(config.steps // program.steps_per_round), everywhere)
    yield rows(config.steps, measure(state, last_round, examples, test_examples))


class _InFlight(NamedTuple):
    """Minibatches that asynchronous learners have drawn and parameters of that time; number n is in place n % (k - 1).

    They are turned into gradients when these are applied: one program has no use for them earlier.
    """

    params: Any
    step: jax.Array
    drawn: sampling.Draw


def replica_bytes(config: ConfigDict) -> int:
    """About how much memory one replica takes: parameters, momentum, gradient, snapshot; sampler; a microbatch."""
    problem = problem_lib.make_problem(config)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    image = problem.train_data.images[:1].size
    batch = max(config.learner.batch_size, problem_lib.SCORING_MICROBATCH)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    return 4 * (
        (5 + config.learner.asynchronous) * num_params
        + 12 * len(problem.train_data)
        + 8 * batch * (image + num_params // image)
    )


def check(config: ConfigDict) -> None:
    """Raises InputError for what only `issgd_jax.train` can do."""
    if (config.schedule.name, config.proposal.when) != ("relaxed", "on"):
        raise InputError(
            f"replicas are trained by the relaxed schedule with proposal.when on, got {config.schedule.name} and "
            f"{config.proposal.when}: train one at a time"
        )
    if config.eval_every % config.schedule.steps_per_round or config.steps % config.eval_every:
        raise InputError(
            f"replicas are measured between rounds: eval_every {config.eval_every} must be a multiple of "
            f"steps_per_round {config.schedule.steps_per_round} and divide steps {config.steps}"
        )
    if config.devices.workers not in (None, 1):
        raise InputError(f"replicas have one worker, got {config.devices.workers}: enlarge its chunk_size instead")


class _Program:
    """The functions of one replica, made of its config."""

    def __init__(self, config: ConfigDict, problem: problem_lib.Problem):
        self.steps_per_round = config.schedule.steps_per_round
        self._config, self._problem = config, problem
        self._num_examples = len(problem.train_data)
        self._uniform = config.proposal.name == "uniform"
        self._has_workers = config.workers.enabled and not self._uniform
        if self._has_workers and config.workers.chunk_size > self._num_examples:
            raise InputError(f"workers.chunk_size must be <= {self._num_examples}, got {config.workers.chunk_size}")
        # Scores enter `late` rounds and `offset` steps after the round that they are of began.
        self._late, self._offset = divmod(config.schedule.score_delay, self.steps_per_round)
        # Updates between the parameters of a gradient and its own.
        self._delay = config.learner.asynchronous - 1
        self._proposal = wiring.make_proposal(config)
        self._score_fn = problem_lib.make_score_fn(config, problem)
        self._measure = wiring.make_measure(config, problem)

    def num_scored(self, step: int) -> int:
        """Examples whose scores have entered when `step` is measured; none enters after the last step has begun."""
        now = min(step, self._config.steps - 1)
        rounds = (now - self._config.schedule.score_delay) // self.steps_per_round + 1
        return self._has_workers * max(0, rounds) * self._config.workers.chunk_size

    def start(self, seed: jax.Array, learning_rate: jax.Array) -> Replica:
        params = self._problem.init(jax.random.key(seed))
        optimizer = wiring.make_optimizer(self._config, learning_rate)
        queue = jnp.zeros((self._late + 1, self._config.workers.chunk_size)) if self._has_workers else None
        state = learner.init_train_state(params, optimizer)
        sampler = learner.init_sampler(self._proposal, self._num_examples)
        return Replica(
            state._replace(in_flight=self._first_in_flight(state, sampler, self._stages(seed, learning_rate))),
            sampler,
            queue,
            seed,
            learning_rate,
        )

    def advance(self, replica: Replica, first_round, examples, test_examples) -> tuple[Replica, dict]:
        """Goes on to the next measurement; returns what was measured before the first step."""
        replica = self._begin(replica, first_round, examples)
        measured = self.measure(replica, first_round, examples, test_examples)
        replica = self._steps(replica, first_round, examples)

        def round_(replica, number):
            return self._steps(self._begin(replica, number, examples), number, examples), None

        rounds = self._config.eval_every // self.steps_per_round
        replica, _ = jax.lax.scan(round_, replica, first_round + jnp.arange(1, rounds, dtype=jnp.int32))
        return replica, measured

    def measure(self, replica: Replica, round_, examples, test_examples) -> dict[str, jax.Array]:
        step = round_ * self.steps_per_round
        return self._measure(replica.train_state.params, replica.sampler, step, examples, test_examples)

    def _begin(self, replica: Replica, round_: jax.Array, examples) -> Replica:
        """What happens between two steps: a round of scoring starts, an earlier one enters."""
        if self._has_workers:
            items = jax.tree.map(lambda x: x[self._chunk(round_)], examples)
            scores = self._score_fn(replica.train_state.params, *items)
            replica = replica._replace(queue=jnp.concatenate([replica.queue[1:], scores[None]]))
        if self._uniform:
            return replica
        replica = self._renew(replica, round_)
        return self._enter(replica, round_) if self._has_workers and not self._offset else replica

    def _renew(self, replica: Replica, round_: jax.Array) -> Replica:
        """The table is made anew as long as no round has entered, which would do so."""
        step = round_ * self.steps_per_round

        def renew(sampler: learner.SamplerState) -> learner.SamplerState:
            return learner.renew(self._proposal, sampler, step=step)

        waiting = not self._has_workers or step < self._config.schedule.score_delay
        return replica._replace(sampler=jax.lax.cond(waiting, renew, lambda sampler: sampler, replica.sampler))

    def _steps(self, replica: Replica, round_: jax.Array, examples) -> Replica:
        """The learner's steps of one round."""
        before_entry = self._offset if self._has_workers else 0
        replica = self._learn(replica, before_entry, examples)
        if before_entry:
            replica = self._enter(replica, round_)
        return self._learn(replica, self.steps_per_round - before_entry, examples)

    def _enter(self, replica: Replica, round_: jax.Array) -> Replica:
        of_round = round_ - self._late
        step = round_ * self.steps_per_round + self._offset

        def enter(sampler: learner.SamplerState) -> learner.SamplerState:
            return learner.take_in(
                self._proposal,
                sampler,
                self._chunk(of_round),
                replica.queue[0],
                scored_at=of_round * self.steps_per_round,
                step=step,
                are_norms=self._config.workers.score == "gradient_norm",
            )

        return replica._replace(sampler=jax.lax.cond(of_round >= 0, enter, lambda sampler: sampler, replica.sampler))

    def _chunk(self, round_: jax.Array) -> jax.Array:
        """i32[chunk]: the examples of a round, one chunk after the other."""
        chunk_size, num_examples = self._config.workers.chunk_size, self._num_examples
        num_starts = num_examples // math.gcd(num_examples, chunk_size)  # after which they come again
        starts = (np.arange(num_starts, dtype=np.int64) * chunk_size % num_examples).astype(np.int32)
        start = jnp.asarray(starts)[round_ % num_starts]
        return (start + jnp.arange(chunk_size, dtype=jnp.int32)) % num_examples

    def _stages(self, seed: jax.Array, learning_rate: jax.Array) -> learner.Stages:
        optimizer = wiring.make_optimizer(self._config, learning_rate)
        return wiring.make_stages(self._config, self._problem, optimizer, seed=seed)

    def _first_in_flight(self, state, sampler, stages: learner.Stages) -> _InFlight | tuple[()]:
        """All learners but one begin at the first parameters."""
        if not self._delay:
            return ()
        drawn = jax.vmap(functools.partial(stages.draw, sampler))(jnp.arange(self._delay))
        versions = jax.tree.map(lambda x: jnp.broadcast_to(x, (self._delay, *x.shape)), (state.params, state.step))
        return _InFlight(*versions, drawn)

    def _begin_and_take(self, stages: learner.Stages, state, sampler) -> tuple[_InFlight, Any]:
        """What is applied in this step, and what is in flight after it: one learner begins, the oldest is done."""
        begun = _InFlight(state.params, state.step, stages.draw(sampler, state.step + self._delay))
        if not self._delay:
            return begun, ()
        place = state.step % self._delay
        done = jax.tree.map(lambda ring: ring[place], state.in_flight)
        return done, jax.tree.map(lambda ring, new: ring.at[place].set(new), state.in_flight, begun)

    def _learn(self, replica: Replica, num_steps: int, examples) -> Replica:
        stages = self._stages(replica.seed, replica.learning_rate)

        def step(state, _) -> Any:
            train_state, sampler = state
            done, in_flight = self._begin_and_take(stages, train_state, sampler)
            gradient = stages.gradient(*done, examples)
            train_state, sampler, _ = stages.update(train_state, sampler, self._proposal, gradient)
            return (train_state._replace(in_flight=in_flight), sampler), None

        (train_state, sampler), _ = jax.lax.scan(step, (replica.train_state, replica.sampler), length=num_steps)
        return replica._replace(train_state=train_state, sampler=sampler)

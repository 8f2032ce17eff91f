"""From a config to the parts of a run."""

import dataclasses
import functools

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax import devices, processes
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.cluster.worker import Work
from issgd_jax.errors import InputError
from issgd_jax.learning import asgd
from issgd_jax.learning import payoff as payoff_lib
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.learning.optimizer import create_optimizer
from issgd_jax.loading.source import arguments
from issgd_jax.run.measure import make_measure, measure_on
from issgd_jax.run.parts import Parts
from issgd_jax.sampling import Calibrated, Mixture, Proportional, Sampler, Uniform
from issgd_jax.sampling.draws import largest_minibatch
from issgd_jax.scoring import schedule
from issgd_jax.scoring.workers import WorkerPool
from issgd_jax.task import data
from issgd_jax.task.images import ImageProblem, make_objective, make_problem
from issgd_jax.task.problem import (
    Problem,
    check_memory,
    import_problem,
    make_score_fn,
    make_worker_score_fn,
    minibatch_size,
)
from issgd_jax.task.problem import check as check_problem


def make_parts(config: ConfigDict, problem: Problem | None = None) -> Parts:
    """Returns the parts of a run of the config; raises InputError if a value cannot work."""
    prepared = prepare(config, problem)
    with jax.default_device(prepared.roles.learner):
        return build(prepared)


def resolve(config: ConfigDict, problem: Problem | None = None) -> ConfigDict:
    """Returns the config as it is run and recorded, with the name of the problem.

    Raises:
      InputError: a value cannot work.
    """
    config_lib.validate(config)
    config = config.copy_and_resolve_references()
    if config.proposal.when == "off":
        config.proposal.name = "uniform"
    config.learner.draw, config.learner.limit = config_lib.draw_and_limit(config)
    if problem is None:
        return config
    if config.problem is not None:
        raise InputError(f"problem is given, and config.problem is {config.problem!r}: give one of them")
    if config.cluster.address is not None:
        raise InputError(
            "cluster.address is set, but workers on other machines must make the problem themselves: give it as "
            "--config.problem=module:function"
        )
    parts = (getattr(problem.loss_fn, name, None) for name in ("__module__", "__qualname__"))
    config.problem = problem.name or ".".join(filter(None, parts)) or type(problem.loss_fn).__name__
    return config


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has been checked, and of which nothing is compiled."""

    config: ConfigDict
    roles: devices.Roles
    problem: Problem
    sampler: Sampler
    optimizer: optax.GradientTransformation
    train_examples: tuple
    pool: WorkerPool | ClusterPool | None


def prepare(config: ConfigDict, problem: Problem | None = None) -> Prepared:
    """Checks config and problem, and loads the data.

    Raises:
      InputError: a value cannot work.
    """
    reference = config.problem if problem is None else None
    config = resolve(config, problem)
    processes.join(**config.distributed)
    is_asynchronous = config.learner.asynchronous > 1
    roles = devices.assign_roles(
        config.learner.asynchronous if is_asynchronous else config.devices.learners,
        config.devices.workers,
        config.devices.host_platform_count,
        together=not is_asynchronous,
    )
    with jax.default_device(roles.learner):
        if reference is not None:
            problem = import_problem(reference)
        if problem is None:
            problem = make_problem(config)
        else:
            check_problem(problem)
        check_memory(config, problem, roles.learner)
        sampler = make_sampler(config, problem.source("train").num_examples)
        optimizer = problem.optimizer or make_optimizer(config)
        train_examples = devices.put(problem.examples("train"), roles.placement)
        pool = _make_pool(config, roles, problem, train_examples)
        return Prepared(config, roles, problem, sampler, optimizer, train_examples, pool)


def build(prepared: Prepared) -> Parts:
    """Returns the parts of a run, on its devices."""
    config, problem, roles, pool = prepared.config, prepared.problem, prepared.roles, prepared.pool
    sampler, train_examples = devices.put(prepared.sampler, roles.placement), prepared.train_examples
    params = jax.jit(problem.init)(jax.random.key(config.seed))
    payoff = _make_payoff(config, sampler.num_examples, pool)
    train_state = devices.put(TrainState.init(params, prepared.optimizer), roles.placement)
    sampler_state = devices.put(prepared.sampler.init(config.seed), roles.placement)
    schedule_of_rounds = _make_schedule(config.schedule, pool)
    train_steps = None
    if config.learner.asynchronous > 1:
        learners = _make_asynchronous(prepared, moments=payoff is not None)
        train_state, sampler_state = learners.start(train_state, sampler_state, sampler)
        train_step = learners.train_step
    else:
        learner = make_learner(config, problem, prepared.optimizer, moments=payoff is not None, mesh=roles.mesh)
        train_step = learner.compile()
        # Else scores enter when they are ready, processes agree on each step, or the payoff counts each minibatch.
        if (not pool or schedule_of_rounds.is_reproducible) and not roles.mesh and not payoff:
            train_steps = learner.compile_steps()
    return Parts(
        train_state=train_state,
        sampler_state=sampler_state,
        sampler=sampler,
        train_step=train_step,
        train_steps=train_steps,
        train_examples=train_examples,
        measure=measure_on(
            roles.learner, make_measure(config, problem, prepared.sampler), problem, devices.one_copy(train_examples)
        ),
        pool=pool,
        broadcast=_params_and_step if problem.keyed else _params,
        schedule=schedule_of_rounds,
        window=config.schedule.steps_per_round,
        are_norms=config.workers.score == "gradient_norm",
        payoff=payoff,
        learner_device=roles.learner,
        placement=roles.placement,
        agree=processes.agreement(roles.mesh),
        batch_size=minibatch_size(config),
    )


def _params(state: TrainState):
    return state.params


def _params_and_step(state: TrainState):
    return state.params, state.step


def make_sampler(config: ConfigDict, num_examples: int) -> Sampler:
    """Returns the config's sampler.

    Raises:
      InputError: a minibatch is larger than what it is drawn from.
    """
    batch_size, (draw, limit) = minibatch_size(config), config_lib.draw_and_limit(config)
    if num_examples < 2:
        raise InputError("there is 1 training example: the variance of the gradients needs at least 2")
    available = min(num_examples, largest_minibatch(num_examples, draw))
    if batch_size > available:
        learners = f" on each of {config.devices.learners} learners" if config.devices.learners > 1 else ""
        raise InputError(
            f"learner.batch_size is {config.learner.batch_size}{learners}, but there are {available} examples to draw "
            "from: lower it"
        )
    counted = config_lib.samples_by_importance(config)
    # The loop rebuilds.
    return Sampler(
        num_examples,
        batch_size,
        make_proposal(config),
        draw,
        rebuild_every=0,
        count_draws=counted,
        limit=limit,
    )


def make_proposal(config: ConfigDict) -> Uniform | Proportional | Mixture:
    """Returns the config's proposal."""
    name, config = config.proposal.name, config.proposal
    if name == "uniform":
        return Uniform()
    if name == "proportional":
        return Proportional(config.smoothing, config.relative, config.max_staleness)
    if name == "mixture":
        return Mixture(Proportional(config.smoothing, config.relative), config.uniform_fraction)
    return Mixture(Calibrated(config.half_life), config.uniform_fraction)


def make_optimizer(config: ConfigDict, learning_rate: float | jax.Array | None = None) -> optax.GradientTransformation:
    """Returns the config's optimiser; learning_rate replaces the config's."""
    return create_optimizer(
        config.learner.optimizer,
        learning_rate=config.learner.learning_rate if learning_rate is None else learning_rate,
        lr_schedule=config.learner.lr_schedule,
        steps=config.steps,
        momentum=config.learner.momentum,
        nesterov=config.learner.nesterov,
        rate_by_gain=config.learner.rate_by_gain,
    )


def make_learner(config: ConfigDict, problem: Problem, optimizer, **options) -> Learner:
    """Returns the config's learner; options: further fields of `Learner`."""
    return Learner(
        problem.loss_fn,
        optimizer,
        refresh=config.learner.refresh and config_lib.samples_by_importance(config),
        score_fn=None if config.workers.score == "gradient_norm" else make_score_fn(config, problem),
        skip_nonfinite=config.on_nonfinite == "skip",
        loss_seed=config.seed if problem.keyed else None,
        **options,
    )


def _make_asynchronous(prepared: Prepared, *, moments: bool) -> asgd.AsynchronousLearners:
    config, number = prepared.config, prepared.config.learner.asynchronous
    max_delay = number - 1
    if config.schedule.name == "free_running":
        given = config.learner.max_gradient_delay
        max_delay = 2 * max_delay if given is None else given
    # The next loss, of other parameters, would not tell which minibatch was not finite.
    learner = make_learner(config, prepared.problem, prepared.optimizer, moments=moments, check_gradient=True)
    return asgd.AsynchronousLearners(
        learner, prepared.train_examples, devices=prepared.roles.learners, number=number, max_delay=max_delay
    )


def _make_payoff(
    config: ConfigDict, num_examples: int, pool: WorkerPool | ClusterPool | None
) -> payoff_lib.Payoff | None:
    if config.proposal.when != "auto" or not config_lib.samples_by_importance(config):
        return None
    steps_per_round = config.schedule.steps_per_round
    rounds = pool.rounds_per_sweep if pool else -(-num_examples // (minibatch_size(config) * steps_per_round))
    # The last round of the first sweep takes its delay to enter.
    trial = rounds + -(-config.schedule.score_delay // steps_per_round) + payoff_lib.REMEMBERED
    return payoff_lib.Payoff(minibatch_size(config), steps_per_round, trial, config.proposal.cost)


def _make_pool(config: ConfigDict, roles: devices.Roles, problem: Problem, train_examples):
    if not config_lib.samples_by_importance(config) or not config.workers.enabled:
        return None
    is_shared = roles.workers == (roles.learner,)
    try:
        if config.cluster.address is not None:
            return _make_cluster_pool(config, problem)
        return WorkerPool(
            make_worker_score_fn(config, problem),
            train_examples if is_shared else problem.examples("train"),
            devices=roles.workers,
            chunk_size=config.workers.chunk_size,
        )
    except ValueError as error:
        raise InputError(f"{error} (see --config.workers.chunk_size, --config.devices.workers)") from error


def _make_cluster_pool(config: ConfigDict, problem: Problem) -> ClusterPool:
    if jax.process_count() > 1:
        raise InputError(
            f"cluster.address is {config.cluster.address!r}, but the learner spans {jax.process_count()} processes, "
            "each of which would get other scores: use devices.learners in one process, or workers on its machines"
        )
    params = jax.eval_shape(problem.init, jax.random.key(0))
    if isinstance(problem, ImageProblem):
        make = functools.partial(make_work, config.to_dict(), problem.num_classes, *problem.standardization)
    else:
        make = functools.partial(make_own_work, config.to_dict())
    return ClusterPool(
        make,
        num_examples=problem.source("train").num_examples,
        chunk_size=config.workers.chunk_size,
        address=config.cluster.address,
        num_workers=config.cluster.workers,
        reproducible=config.schedule.name != "free_running",
        params_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    )


def make_work(config: dict, num_classes: int, mean: np.ndarray, std: np.ndarray) -> Work:
    """Returns the work of a worker on images; called on its machine, and reads nothing of the data but its size.

    Raises:
      InputError: the machine lacks the data or the devices.
    """
    config = ConfigDict(config)
    name, split, folder = config.data.name, config.data.train_split, config.data.dir

    def load(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        rows = data.load(name, split, folder, rows=(first, last))
        return rows.images, rows.labels

    return Work(
        make_worker_score_fn(config, make_objective(config, num_classes, mean, std)),
        load,
        data.count(name, split, folder),
        devices.scoring_devices(config.devices.workers, config.devices.host_platform_count),
    )


def make_own_work(config: dict) -> Work:
    """Returns the work of a worker on the problem that config.problem names; called on its machine.

    Raises:
      InputError: the machine lacks the module or the devices.
    """
    config = ConfigDict(config)
    problem = import_problem(config.problem)
    source = problem.source("train")
    return Work(
        make_worker_score_fn(config, problem),
        lambda first, last: arguments(source.gather(np.arange(first, last))),
        source.num_examples,
        devices.scoring_devices(config.devices.workers, config.devices.host_platform_count),
    )


def _make_schedule(config: ConfigDict, pool: WorkerPool | ClusterPool | None):
    if config.name == "exact":
        return schedule.Exact(pool.rounds_per_sweep if pool else 0)
    if config.name == "relaxed":
        return schedule.Relaxed(config.steps_per_round, config.score_delay)
    return schedule.FreeRunning(lambda: pool.rounds_ahead if pool else 0)

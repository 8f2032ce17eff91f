"""From a config to the parts of a run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax import devices, processes, sampling
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.cluster.worker import Work
from issgd_jax.errors import InputError
from issgd_jax.learning import asgd, evaluate, learner
from issgd_jax.learning import optimizer as optimizer_lib
from issgd_jax.learning import payoff as payoff_lib
from issgd_jax.run import loop
from issgd_jax.sampling import proposal
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.scoring import schedule
from issgd_jax.scoring.workers import WorkerPool
from issgd_jax.task import data
from issgd_jax.task.problem import Problem, gradient_norm, make_objective, make_problem, make_score_fn, minibatch_size


def make_parts(config: ConfigDict) -> loop.Parts:
    """What a run of the config is made of; raises InputError if a value cannot work."""
    prepared = prepare(config)
    with jax.default_device(prepared.roles.learner):
        return build(prepared)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that has been checked, and of which nothing is compiled."""

    config: ConfigDict
    roles: devices.Roles
    problem: Problem
    optimizer: optax.GradientTransformation
    train_examples: tuple[jax.Array, jax.Array]
    pool: WorkerPool | ClusterPool | None


def prepare(config: ConfigDict) -> Prepared:
    """Checks the config and loads the data; raises InputError if a value cannot work."""
    config_lib.validate(config)
    if config.proposal.when == "off":
        config = config.copy_and_resolve_references()
        config.proposal.name = "uniform"
    processes.join(**config.distributed)
    alone = config.learner.asynchronous > 1
    roles = devices.assign_roles(
        config.learner.asynchronous if alone else config.devices.learners,
        config.devices.workers,
        config.devices.host_platform_count,
        together=not alone,
    )
    with jax.default_device(roles.learner):
        problem = make_problem(config)
        optimizer = make_optimizer(config)
        train_examples = devices.put((problem.train_data.images, problem.train_data.labels), roles.placement)
        return Prepared(
            config, roles, problem, optimizer, train_examples, _make_pool(config, roles, problem, train_examples)
        )


def build(prepared: Prepared) -> loop.Parts:
    """The parts of a run, on its devices."""
    config, problem, optimizer, pool = prepared.config, prepared.problem, prepared.optimizer, prepared.pool
    roles, train_examples = prepared.roles, prepared.train_examples
    chosen = make_proposal(config)
    params = jax.jit(problem.init)(jax.random.key(config.seed))
    payoff = _make_payoff(config, len(problem.train_data), pool)
    train_state = devices.put(learner.init_train_state(params, optimizer), roles.placement)
    sampler = devices.put(learner.init_sampler(chosen, len(problem.train_data)), roles.placement)
    if config.learner.asynchronous > 1:
        learners = _make_learners(prepared, moments=payoff is not None)
        train_state, train_step = learners.start(train_state, sampler), learners.train_step
    else:
        train_step = make_train_step(
            config, problem, optimizer, seed=config.seed, moments=payoff is not None, mesh=roles.mesh
        )
    return loop.Parts(
        train_state=train_state,
        sampler=sampler,
        proposal=devices.put(chosen, roles.placement),
        pool=pool,
        schedule=_make_schedule(config.schedule, pool),
        payoff=payoff,
        draw_uniform=jax.jit(
            functools.partial(
                learner.draw_minibatch,
                sampling.uniform_table(len(problem.train_data)),
                batch_size=minibatch_size(config),
                seed=config.seed,
                draw=config.learner.draw,
            )
        ),
        train_step=train_step,
        measure=_measure_on(roles.learner, make_measure(config, problem), problem, devices.one_copy(train_examples)),
        train_examples=train_examples,
        learner_device=roles.learner,
        placement=roles.placement,
        agree=processes.agreement(roles.mesh),
        batch_size=minibatch_size(config),
        are_norms=config.workers.score == "gradient_norm",
    )


def _make_learners(prepared: Prepared, *, moments: bool) -> asgd.Learners:
    config, number = prepared.config, prepared.config.learner.asynchronous
    max_delay = number - 1
    if config.schedule.name == "free_running":
        given = config.learner.max_gradient_delay
        max_delay = 2 * max_delay if given is None else given
    # The next loss, of other parameters, would not tell which minibatch was at fault.
    options = {"seed": config.seed, "moments": moments, "check_gradient": True}
    stages = make_stages(config, prepared.problem, prepared.optimizer, **options)
    return asgd.Learners(
        stages, prepared.train_examples, devices=prepared.roles.learners, number=number, max_delay=max_delay
    )


def _make_payoff(config: ConfigDict, num_examples: int, pool: WorkerPool | None) -> payoff_lib.Payoff | None:
    if config.proposal.when != "auto" or config.proposal.name == "uniform":
        return None
    steps_per_round = config.schedule.steps_per_round
    rounds = pool.rounds_per_sweep if pool else -(-num_examples // (minibatch_size(config) * steps_per_round))
    # The last round of the first sweep takes its delay to enter.
    trial = rounds + -(-config.schedule.score_delay // steps_per_round) + payoff_lib.REMEMBERED
    return payoff_lib.Payoff(minibatch_size(config), steps_per_round, trial, config.proposal.cost)


def _measure_on(device, measure: Callable, problem: Problem, train_examples):
    """Returns `(params, sampler, step) -> row of metrics`, measured on the device."""
    test_examples = jax.device_put((problem.test_data.images, problem.test_data.labels), device)

    def row_of(params, sampler, step) -> dict[str, float]:
        return to_row(jax.device_get(measure(params, sampler, step, train_examples, test_examples)))

    return row_of


def to_row(measured: dict) -> dict[str, float]:
    """Numbers of Python, for a row of metrics, from the arrays f[] of a measurement."""
    return {name: value.item() for name, value in measured.items()}


def make_measure(config: ConfigDict, problem: Problem) -> Callable[..., dict[str, jax.Array]]:
    """Returns `(params, sampler, step, train_examples, test_examples) -> {metric name: f[]}`, over whole splits."""
    num_examples = len(problem.train_data)
    sample_size = min(config.monitor.examples, num_examples)
    sample = np.sort(np.random.default_rng(0).permutation(num_examples)[:sample_size]).astype(np.int32)
    evaluate_split = evaluate.make_evaluate(problem.outcome_fn)
    measure_variance = evaluate.make_measure_variance(problem.loss_fn, gradient_norm(problem))

    def measure(params, sampler, step, train_examples, test_examples):
        train_loss, train_error = evaluate_split(params, train_examples)
        test_loss, test_error = evaluate_split(params, test_examples)
        roots = measure_variance(params, sampler.table, train_examples, sample)
        measured = {
            "train/loss": train_loss,
            "train/error": train_error,
            "test/loss": test_loss,
            "test/error": test_error,
            **{f"variance/{name}": value for name, value in roots._asdict().items()},
            # Uniform minibatches of so many examples would be as steady.
            "variance/equivalent_batch": minibatch_size(config) * roots.gain,
        }
        if config.proposal.name == "uniform":
            return measured
        described = _describe_scores(sampler, step, minibatch_size(config))
        return measured | {f"scores/{name}": value for name, value in described.items()}

    return jax.jit(measure)


def _describe_scores(sampler: learner.SamplerState, step: jax.Array, batch_size: int) -> dict[str, jax.Array]:
    scored = sampler.store.scored
    staleness = jnp.where(scored, sampler.store.staleness(step), 0)
    num_scored = jnp.sum(scored)
    return {
        "staleness_mean": jnp.sum(staleness) / jnp.maximum(num_scored, 1),
        "staleness_max": jnp.max(staleness),
        "scored_fraction": num_scored / scored.shape[0],
        "effective_sample_size": sampling.effective_sample_size(sampler.table, batch_size),
        "rejected": sampler.rejected.count,
    }


def make_optimizer(config: ConfigDict, learning_rate: float | jax.Array | None = None):
    """The config's optimiser; learning_rate takes the place of the config's."""
    return optimizer_lib.make_optimizer(
        config.learner.optimizer,
        learning_rate=config.learner.learning_rate if learning_rate is None else learning_rate,
        lr_schedule=config.learner.lr_schedule,
        steps=config.steps,
        momentum=config.learner.momentum,
        nesterov=config.learner.nesterov,
    )


def make_train_step(config: ConfigDict, problem: Problem, optimizer, **options) -> Callable:
    """The learner's step, see `learner.compile_step`; options: of `make_stages`."""
    return learner.compile_step(make_stages(config, problem, optimizer, **options), options.get("mesh"))


def make_stages(config: ConfigDict, problem: Problem, optimizer, *, seed, **options) -> learner.Stages:
    """The parts of the learner's step; the seed takes the place of the config's. options: of `learner.make_stages`."""
    return learner.make_stages(
        problem.loss_fn,
        optimizer,
        batch_size=minibatch_size(config),
        seed=seed,
        refresh=config.learner.refresh and config.proposal.name != "uniform",
        score_fn=None if config.workers.score == "gradient_norm" else make_score_fn(config, problem),
        draw=config.learner.draw,
        skip_nonfinite=config.on_nonfinite == "skip",
        **options,
    )


def make_proposal(config: ConfigDict) -> proposal.Proposal:
    """The config's proposal."""
    name, config = config.proposal.name, config.proposal
    if name == "uniform":
        return proposal.Uniform()
    if name == "proportional":
        return proposal.Proportional(config.smoothing, config.relative, config.max_staleness)
    if name == "mixture":
        return proposal.Mixture(proposal.Proportional(config.smoothing, config.relative), config.uniform_fraction)
    return proposal.Mixture(Calibrated(config.half_life), config.uniform_fraction)


def _make_pool(config: ConfigDict, roles: devices.Roles, problem: Problem, train_examples):
    if config.proposal.name == "uniform" or not config.workers.enabled:
        return None
    shared = roles.workers == (roles.learner,)
    try:
        if config.cluster.address is not None:
            return _make_cluster_pool(config, problem)
        return WorkerPool(
            make_score_fn(config, problem),
            train_examples if shared else (problem.train_data.images, problem.train_data.labels),
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
    return ClusterPool(
        functools.partial(make_work, config.to_dict(), problem.train_data.num_classes, *problem.standardization),
        num_examples=len(problem.train_data),
        chunk_size=config.workers.chunk_size,
        address=config.cluster.address,
        num_workers=config.cluster.workers,
        reproducible=config.schedule.name != "free_running",
        params_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    )


def make_work(config: dict, num_classes: int, mean: np.ndarray, std: np.ndarray) -> Work:
    """What a worker on another machine is for; called there, and reads nothing of the data but its size.

    Raises: InputError if the machine has not the data, or not the devices.
    """
    config = ConfigDict(config)
    name, split, folder = config.data.name, config.data.train_split, config.data.dir

    def load(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        rows = data.load(name, split, folder, rows=(first, last))
        return rows.images, rows.labels

    return Work(
        make_score_fn(config, make_objective(config, num_classes, mean, std)),
        load,
        data.count(name, split, folder),
        devices.scoring_devices(config.devices.workers, config.devices.host_platform_count),
    )


def _make_schedule(config: ConfigDict, pool: WorkerPool | None):
    if config.name == "exact":
        return schedule.Exact(pool.rounds_per_sweep if pool else 0)
    if config.name == "relaxed":
        return schedule.Relaxed(config.steps_per_round, config.score_delay)
    return schedule.FreeRunning(lambda: pool.rounds_ahead if pool else 0)

"""From a config to the parts of a run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from issgd_jax import (
    asgd,
    data,
    devices,
    evaluate,
    learner,
    loop,
    losses,
    models,
    processes,
    proposal,
    sampling,
    schedule,
)
from issgd_jax import config as config_lib
from issgd_jax import optimizer as optimizer_lib
from issgd_jax import payoff as payoff_lib
from issgd_jax import scores as scores_lib
from issgd_jax import uniform as uniform_lib
from issgd_jax.calibrated import Calibrated
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.cluster.worker import Work
from issgd_jax.errors import InputError
from issgd_jax.gradnorm import explain
from issgd_jax.workers import WorkerPool

# Examples scored at one time: enough to fill the units of a device, few enough for the activations of any network.
SCORING_MICROBATCH = 256
# At least: parameter, momentum, gradient.
BYTES_A_PARAMETER, BYTES_A_GRADIENT = 12, 4


def make_parts(config: ConfigDict) -> loop.Parts:
    """What a run of the config is made of; raises InputError if a value cannot work."""
    prepared = prepare(config)
    with jax.default_device(prepared.roles.learner):
        return build(prepared)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is to be learned. init: key -> params; logits_fn, loss_fn and outcome_fn: of one example."""

    init: Callable
    logits_fn: Callable
    loss_fn: Callable
    outcome_fn: Callable


@dataclasses.dataclass(frozen=True)
class Problem(Objective):
    """What is to be learned, and from which data. standardization: mean and deviation of the training images."""

    train_data: data.Dataset
    test_data: data.Dataset
    standardization: tuple[np.ndarray, np.ndarray]


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


def minibatch_size(config: ConfigDict) -> int:
    """Examples in a minibatch, of all learner devices together."""
    return config.devices.learners * config.learner.batch_size


def make_problem(config: ConfigDict) -> Problem:
    """The config's data, network and loss.

    Raises: InputError if the data is not there or too small, or the network cannot take it; compiles nothing.
    """
    train_data, test_data = (_load(config.data, split) for split in ("train_split", "test_split"))
    available = len(train_data) // (uniform_lib.SUBSET if config.learner.draw == "random_subset" else 1)
    if minibatch_size(config) > available:
        times = f" on each of {config.devices.learners} learners" if config.devices.learners > 1 else ""
        raise InputError(
            f"learner.batch_size is {config.learner.batch_size}{times}, but there are {available} examples to draw "
            "from: lower it"
        )
    if len(train_data) < 2:
        raise InputError("data.train_split has 1 example: the variance of its gradients needs at least 2")
    if train_data.images.shape[1:] != test_data.images.shape[1:]:
        raise InputError(f"images differ: train {train_data.images.shape[1:]}, test {test_data.images.shape[1:]}")

    standardization = data.standardization(train_data.images)
    objective = make_objective(config, train_data.num_classes, *standardization)
    try:
        params = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
        jax.eval_shape(objective.outcome_fn, params, train_data.images[0], train_data.labels[0])
    except Exception as error:  # whatever the network's library raises: traced here, before anything is compiled
        raise InputError(
            f"model {config.model.name} cannot take images of shape {train_data.images.shape[1:]} (see "
            f"--config.model): {error}"
        ) from error
    _check_memory(config, params)
    return Problem(train_data=train_data, test_data=test_data, standardization=standardization, **vars(objective))


def make_objective(config: ConfigDict, num_classes: int, mean: np.ndarray, std: np.ndarray) -> Objective:
    """The config's network and loss, for images standardized by mean and std f32[H, W, C]."""
    model = models.MODELS[config.model.name](num_classes, **config.model[config.model.name].to_dict())

    def init(key):
        return model.init(key, jnp.asarray(mean))

    def logits_fn(params, image):
        return model.apply(params, (image - mean) / std)

    def loss_fn(params, image, label):
        return losses.example_loss(logits_fn(params, image), label)

    def outcome_fn(params, image, label):
        outputs = logits_fn(params, image)
        return losses.example_loss(outputs, label), losses.example_error(outputs, label)

    return Objective(init, logits_fn, loss_fn, outcome_fn)


def _load(config: ConfigDict, split: str) -> data.Dataset:
    try:
        return data.load(config.name, config[split], config.dir)
    except InputError as error:
        raise InputError(f"{error} (see --config.data.name, --config.data.{split})") from error


def _check_memory(config: ConfigDict, params) -> None:
    device = jax.config.jax_default_device or jax.devices()[0]
    num_params = sum(x.size for x in jax.tree.leaves(params))
    in_flight = BYTES_A_GRADIENT * (config.learner.asynchronous - 1)
    needed, limit = (BYTES_A_PARAMETER + in_flight) * num_params, devices.memory_bytes(device)
    if needed > limit:
        raise InputError(
            f"model {config.model.name} has {num_params:,} parameters, which need {needed:,} bytes, but {device} has "
            f"{limit:,}: make it smaller (see --config.model)"
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
    measure_variance = evaluate.make_measure_variance(problem.loss_fn, _gradient_norm(problem))

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
    if config.cluster.address is not None:
        return _make_cluster_pool(config, problem)
    shared = roles.workers == (roles.learner,)
    try:
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


def _gradient_norm(objective: Objective) -> Callable:
    return scores_lib.GradientNorm(objective.loss_fn, SCORING_MICROBATCH)


def make_score_fn(config: ConfigDict, objective: Objective) -> Callable:
    """What the workers find out about each example: `(params, *batch) -> f32[B]`."""
    if config.workers.score == "last_layer":
        return scores_lib.last_layer(objective.logits_fn, SCORING_MICROBATCH)
    if config.workers.score == "loss":
        return scores_lib.loss(objective.loss_fn, SCORING_MICROBATCH)
    return _gradient_norm(objective)


def explain_norms(problem: Problem):
    """How the gradient norm of each parameter is computed."""
    params = jax.eval_shape(problem.init, jax.random.key(0))
    return explain(problem.loss_fn, params, problem.train_data.images[:1], problem.train_data.labels[:1])


def _make_schedule(config: ConfigDict, pool: WorkerPool | None):
    if config.name == "exact":
        return schedule.Exact(pool.rounds_per_sweep if pool else 0)
    if config.name == "relaxed":
        return schedule.Relaxed(config.steps_per_round, config.score_delay)
    return schedule.FreeRunning(lambda: pool.rounds_ahead if pool else 0)

"""What is learned: init, loss of one example, metrics, training and test data; and the scores of it."""

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from issgd_jax import devices
from issgd_jax.errors import InputError
from issgd_jax.gradnorm import explain, per_example_grad_norms, positional_key
from issgd_jax.loading.source import Source, arguments, as_source
from issgd_jax.scoring import scores as scores_lib

# Examples scored at a time: enough to fill a device, few enough for the activations of any network to fit.
SCORING_MICROBATCH = 256
# Lower bound: parameter, momentum, gradient.
BYTES_A_PARAMETER, BYTES_A_GRADIENT = 12, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Functions of ONE example, without data; attributes as the arguments of `Problem`."""

    init: Callable[[jax.Array], Any]
    loss_fn: Callable[..., jax.Array]
    metrics: Mapping[str, Callable[..., jax.Array]] = dataclasses.field(default_factory=dict)
    logits_fn: Callable[..., jax.Array] | None = None
    keyed: bool = False

    @property
    def positional_loss(self) -> Callable[..., jax.Array]:
        """The loss `(params, *example)`, or `(params, *example, key)` of a keyed one."""
        return positional_key(self.loss_fn) if self.keyed else self.loss_fn

    def on_keyed(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Returns a function that needs no key, for arguments that end with one where the loss is keyed."""
        return scores_lib.without_key(function) if self.keyed else function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(Objective):
    """What `issgd_jax.train` learns: any model, loss and data.

    An example is what the source holds: one that is a tuple becomes several arguments, `loss_fn(params, *example)`,
    anything else, such as a dict, is one.

    Args:
      init: `key -> params`, any pytree of floating-point arrays.
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example; `issgd_jax.per_example` makes one of the loss of a
        batch. A weight that the data gives an example is a factor of its loss.
      metrics: {name: `(params, *example) -> f[]`}, measured as means over both splits, beside the loss. One that is
        named "loss" is measured instead of loss_fn, for instance without dropout; the best checkpoint is that of the
        least test "error", or, without that, of the least test loss.
      logits_fn: `(params, *inputs) -> f[C]`, for the scores of `workers.score=last_layer`, where examples end with a
        label.
      keyed: whether loss_fn takes a random key, `loss_fn(params, *example, key=key)`: one for each example and step.
      train: training examples, see `loading.source.as_source`; they are held on the learner's device.
      test: test examples; None: nothing is measured on them.
      optimizer: of optax; None: that of the config.
      collate: see `loading.source.as_source`.
      name: by which a folder knows its run; None: that of loss_fn.

    Example:
      >>> import tempfile, issgd_jax
      >>> x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
      >>> problem = issgd_jax.Problem(
      ...     init=lambda key: jnp.zeros(3),
      ...     loss_fn=lambda params, x, y: (x @ params - y) ** 2,
      ...     train=(x, x @ np.ones(3, np.float32)),
      ...     optimizer=optax.adam(0.1),
      ...     name="line",
      ... )
      >>> config = issgd_jax.config.default()
      >>> config.steps, config.eval_every, config.workers.chunk_size, config.log.progress = 100, 100, 50, False
      >>> rows = issgd_jax.train(config, tempfile.mkdtemp(), problem=problem)
      >>> rows[-1]["train/loss"] < 0.01
      True
    """

    train: Any
    test: Any = None
    optimizer: optax.GradientTransformation | None = None
    collate: Callable[[list], Any] | None = None
    name: str | None = None

    def source(self, split: str) -> Source:
        """Returns the examples of "train" or "test"; raises InputError if they cannot be read."""
        with _reading(split):
            return as_source(getattr(self, split), self.collate)

    def first(self, split: str) -> tuple:
        """Returns the first example as arguments of the loss, arrays [1, ...]; raises InputError as `source`."""
        source = self.source(split)
        with _reading(split):
            return arguments(source.gather(np.zeros(1, np.int64)))

    def examples(self, split: str) -> tuple | None:
        """Returns all examples as arguments of the loss, arrays [N, ...]; None without test examples.

        Raises:
          InputError: as `source`.
        """
        if getattr(self, split) is None:
            return None
        source = self.source(split)
        with _reading(split):
            return arguments(source.all_rows())


@contextlib.contextmanager
def _reading(split: str) -> Iterator[None]:
    """Turns errors of the data into InputErrors that name the split."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(f"{split} data of the problem: {error}") from error


def import_problem(reference: str) -> Problem:
    """Returns the problem of `module:function`; the module may lie in the working directory.

    Raises:
      InputError: there is no such module or function, or it returns something else.

    Example:
      >>> import_problem("no_such_module:make_problem")
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: problem is 'no_such_module:make_problem', but there is no module 'no_such_module': \
run in the folder that has it, or set PYTHONPATH (see --config.problem)
    """
    module_name, _, function_name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"problem is {reference!r}, but there is no module {error.name!r}: run in the folder that has it, or set "
            "PYTHONPATH (see --config.problem)"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"problem is {reference!r}, but {module_name} has no function {function_name!r}")
    problem = function()
    if not isinstance(problem, Problem):
        raise InputError(
            f"problem is {reference!r}, but it returns a {type(problem).__name__}, not an issgd_jax.Problem"
        )
    return problem


def check(problem: Problem) -> None:
    """Traces a problem of the user's own on one example of each split; compiles nothing.

    Raises:
      InputError: init, the loss or a metric fails on it, or returns something else than a floating-point scalar.
    """
    if not (problem.optimizer is None or isinstance(problem.optimizer, optax.GradientTransformation)):
        raise InputError(
            f"optimizer of the problem must be one of optax, such as optax.adam(1e-3), got {problem.optimizer!r}"
        )
    if not isinstance(problem.metrics, Mapping):
        raise InputError(f"metrics of the problem must be {{name: function}}, got {problem.metrics!r}")
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = _traced("init", problem.init, key)
    for split in ("train", "test") if problem.test is not None else ("train",):
        batch = problem.first(split)
        loss_fn = per_example_grad_norms(problem.loss_fn, keyed=problem.keyed)
        _traced(f"the loss of a {split} example", loss_fn, init, *batch, **({"key": key} if problem.keyed else {}))
        example = jax.tree.map(lambda x: x[0], batch)
        for name, metric in problem.metrics.items():
            value = _traced(f"metric {name!r} of a {split} example", metric, init, *example)
            if jax.tree.map(jnp.shape, value) != ():
                raise InputError(f"metric {name!r} must return one number for one example, got {value}")


def _traced(what: str, function: Callable, *args, **keywords) -> Any:
    try:
        return jax.eval_shape(function, *args, **keywords)
    except Exception as error:  # of the user's own code: traced here, nothing is compiled yet
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", []))
        raise InputError(f"{what} fails: {type(error).__name__}: {error}{notes}") from error


def minibatch_size(config: ConfigDict) -> int:
    """Returns the number of examples in a minibatch, of all learner devices together."""
    return config.devices.learners * config.learner.batch_size


def init_shapes(objective: Objective) -> Any:
    """Returns the shapes of the parameters; compiles nothing."""
    return jax.eval_shape(lambda: objective.init(jax.random.key(0)))


def check_memory(config: ConfigDict, problem: Problem, device: jax.Device) -> None:
    """Raises InputError if parameters and training examples cannot fit on the learner's device."""
    limit = devices.memory_bytes(device)
    num_params = sum(x.size for x in jax.tree.leaves(init_shapes(problem)))
    in_flight = BYTES_A_GRADIENT * (config.learner.asynchronous - 1)
    needed = (BYTES_A_PARAMETER + in_flight) * num_params
    if needed > limit:
        raise InputError(
            f"the model has {num_params:,} parameters, which need {needed:,} bytes, but {device} has {limit:,}: make "
            "it smaller (see --config.model)"
        )
    num_examples = problem.source("train").num_examples
    needed = num_examples * sum(x.nbytes for x in jax.tree.leaves(problem.first("train")))
    if needed > limit:
        raise InputError(
            f"the {num_examples:,} training examples need {needed:,} bytes, but {device} has {limit:,}: use "
            "fewer, or a loop of your own with issgd_jax.Prefetch, which keeps them on the host"
        )


def make_score_fn(config: ConfigDict, objective: Objective) -> Callable:
    """Returns the config's score function, `(params, *batch) -> f32[B]`; of a keyed loss `(params, *batch, keys)`.

    Raises:
      InputError: the scores need logits, and the problem has none.
    """
    if config.workers.score == "last_layer":
        if objective.logits_fn is None:
            raise InputError("workers.score is last_layer, but the problem has no logits_fn: use gradient_norm or loss")
        return objective.on_keyed(scores_lib.last_layer(objective.logits_fn, SCORING_MICROBATCH))
    if config.workers.score == "loss":
        return scores_lib.loss(objective.positional_loss, SCORING_MICROBATCH)
    return scores_lib.GradientNorm(objective.positional_loss, SCORING_MICROBATCH)


def make_worker_score_fn(config: ConfigDict, objective: Objective) -> Callable:
    """Returns the score function of the workers, `(params, *batch)`; of a keyed loss `((params, step), *batch)`."""
    score_fn = make_score_fn(config, objective)
    if config.workers.precision != "float32":
        score_fn = scores_lib.InPrecision(score_fn, config.workers.precision)
    return scores_lib.Keyed(score_fn, config.seed) if objective.keyed else score_fn


def explain_norms(problem: Problem):
    """Returns how the gradient norm of each parameter is computed, see `gradnorm.explain`."""
    return explain(problem.loss_fn, init_shapes(problem), *problem.first("train"), keyed=problem.keyed)

"""The learning problem of a config: data, network, loss and scores."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from issgd_jax import devices
from issgd_jax.errors import InputError
from issgd_jax.gradnorm import explain
from issgd_jax.scoring import scores as scores_lib
from issgd_jax.task import data, losses, models

# Examples scored at a time: enough to fill a device, few enough for the activations of any network to fit.
SCORING_MICROBATCH = 256
# Lower bound: parameter, momentum, gradient.
BYTES_A_PARAMETER, BYTES_A_GRADIENT = 12, 4


@dataclasses.dataclass(frozen=True)
class Objective:
    """Network and loss of ONE example: image uint8[H, W, channels], label i32[].

    Attributes:
      init: `key -> params`.
      logits_fn: `(params, image) -> f32[C]`.
      loss_fn: `(params, image, label) -> f32[]`.
      outcome_fn: `(params, image, label) -> (loss f32[], error f32[])`.
    """

    init: Callable
    logits_fn: Callable
    loss_fn: Callable
    outcome_fn: Callable


@dataclasses.dataclass(frozen=True)
class Problem(Objective):
    """An objective with its data.

    Attributes:
      train_data, test_data: the two splits.
      standardization: mean and standard deviation of the training images, f32[H, W, channels] each.
    """

    train_data: data.Dataset
    test_data: data.Dataset
    standardization: tuple[np.ndarray, np.ndarray]


def minibatch_size(config: ConfigDict) -> int:
    """Returns the number of examples in a minibatch, of all learner devices together."""
    return config.devices.learners * config.learner.batch_size


def make_problem(config: ConfigDict) -> Problem:
    """Loads the config's data, and checks that its network can take them; compiles nothing.

    Raises:
      InputError: the data is missing or too small, or the network cannot take it or does not fit in memory.
    """
    train_data, test_data = (_load(config.data, split) for split in ("train_split", "test_split"))
    if len(train_data) < 2:
        raise InputError("data.train_split has 1 example: the variance of its gradients needs at least 2")
    if train_data.images.shape[1:] != test_data.images.shape[1:]:
        raise InputError(f"images differ: train {train_data.images.shape[1:]}, test {test_data.images.shape[1:]}")

    standardization = data.standardization(train_data.images)
    objective = make_objective(config, train_data.num_classes, *standardization)
    try:
        params = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
        jax.eval_shape(objective.outcome_fn, params, train_data.images[0], train_data.labels[0])
    except Exception as error:  # any error of the network's library: only traced here, nothing is compiled yet
        raise InputError(
            f"model {config.model.name} cannot take images of shape {train_data.images.shape[1:]} (see "
            f"--config.model): {error}"
        ) from error
    _check_memory(config, params)
    return Problem(train_data=train_data, test_data=test_data, standardization=standardization, **vars(objective))


def make_objective(config: ConfigDict, num_classes: int, mean: np.ndarray, std: np.ndarray) -> Objective:
    """Returns the config's network and loss.

    Args:
      config: of the run.
      num_classes: C.
      mean, std: standardization of the images, f32[H, W, channels].
    """
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


def gradient_norm(objective: Objective) -> Callable:
    """Returns the score function of gradient norms, see `scores.GradientNorm`."""
    return scores_lib.GradientNorm(objective.loss_fn, SCORING_MICROBATCH)


def make_score_fn(config: ConfigDict, objective: Objective) -> Callable:
    """Returns the config's score function of the workers, `(params, *batch) -> f32[B]`."""
    if config.workers.score == "last_layer":
        return scores_lib.last_layer(objective.logits_fn, SCORING_MICROBATCH)
    if config.workers.score == "loss":
        return scores_lib.loss(objective.loss_fn, SCORING_MICROBATCH)
    return gradient_norm(objective)


def explain_norms(problem: Problem):
    """Returns how the gradient norm of each parameter is computed, see `gradnorm.explain`."""
    params = jax.eval_shape(problem.init, jax.random.key(0))
    return explain(problem.loss_fn, params, problem.train_data.images[:1], problem.train_data.labels[:1])

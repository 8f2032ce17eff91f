"""The problem of a config: image classification with its data, network and loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from issgd_jax.errors import InputError
from issgd_jax.task import data, losses, models
from issgd_jax.task.problem import Objective, Problem, init_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProblem(Problem):
    """The problem of a config: image uint8[H, W, channels], label i32[].

    Attributes:
      num_classes: C.
      standardization: mean and standard deviation of the training images, f32[H, W, channels] each.
    """

    num_classes: int
    standardization: tuple[np.ndarray, np.ndarray]


def make_problem(config: ConfigDict) -> ImageProblem:
    """Loads the config's data, and checks that its network can take them; compiles nothing.

    Raises:
      InputError: the data is missing or too small, or the network cannot take it or does not fit in memory.
    """
    train_data, test_data = (_load(config.data, split) for split in ("train_split", "test_split"))
    if train_data.images.shape[1:] != test_data.images.shape[1:]:
        raise InputError(f"images differ: train {train_data.images.shape[1:]}, test {test_data.images.shape[1:]}")

    standardization = data.standardization(train_data.images)
    objective = make_objective(config, train_data.num_classes, *standardization)
    try:
        params = init_shapes(objective)
        jax.eval_shape(objective.loss_fn, params, train_data.images[0], train_data.labels[0])
    except Exception as error:  # any error of the network's library: only traced here, nothing is compiled yet
        raise InputError(
            f"model {config.model.name} cannot take images of shape {train_data.images.shape[1:]} (see "
            f"--config.model): {error}"
        ) from error
    return ImageProblem(
        **vars(objective),
        train=(train_data.images, train_data.labels),
        test=(test_data.images, test_data.labels),
        num_classes=train_data.num_classes,
        standardization=standardization,
    )


def make_objective(config: ConfigDict, num_classes: int, mean: np.ndarray, std: np.ndarray) -> Objective:
    """Returns the config's network and loss.

    Args:
      config: of the run.
      num_classes: C.
      mean, std: standardization of the images, f32[H, W, channels].
    """
    model = models.MODELS[config.model.name](num_classes, **config.model[config.model.name].to_dict())
    # For a sum and a product, which XLA makes of a difference and a quotient anyway: it moves what it computes for them
    # out of a loop, once for the loss and once for the error, and then sees no longer that both need one forward pass.
    minus_mean, inverse_std = -mean, 1 / std

    def init(key):
        return model.init(key, jnp.asarray(mean))

    def logits_fn(params, image):
        # Pixels are integers, which take no part in a cast of parameters and examples.
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return model.apply(params, ((image + minus_mean) * inverse_std).astype(dtype))

    def loss_fn(params, image, label):
        return losses.example_loss(logits_fn(params, image), label)

    def error_fn(params, image, label):
        return losses.example_error(logits_fn(params, image), label)

    return Objective(init=init, loss_fn=loss_fn, metrics={"error": error_fn}, logits_fn=logits_fn)


def _load(config: ConfigDict, split: str) -> data.Dataset:
    try:
        return data.load(config.name, config[split], config.dir)
    except InputError as error:
        raise InputError(f"{error} (see --config.data.name, --config.data.{split})") from error

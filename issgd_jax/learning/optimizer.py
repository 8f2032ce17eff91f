"""Optax optimisers by name, with a learning-rate schedule, and perhaps a rate that follows the gain."""

import difflib
import inspect

import jax
import optax

from issgd_jax.errors import InputError
from issgd_jax.learning.rate_by_gain import rate_by_gain as follow_gain


def create_optimizer(
    name: str,
    *,
    learning_rate: float | jax.Array,
    lr_schedule: str,
    steps: int,
    momentum: float,
    nesterov: bool,
    rate_by_gain: bool = False,
) -> optax.GradientTransformation:
    """Returns the optimiser `optax.<name>`.

    Args:
      name: of any optax optimiser that needs only gradients and parameters.
      learning_rate: initial rate.
      lr_schedule: `constant`; `cosine` or `linear` decay to 0 at `steps`.
      steps: updates of the run.
      momentum: the optimiser's `momentum`, or its `b1` where it has that instead.
      nesterov: the optimiser's `nesterov`, beside `momentum`; ignored where it has none, and by those with `b1`.
      rate_by_gain: whether the rate is multiplied by the measured gain of the draws, see `rate_by_gain`.

    Raises:
      InputError: optax has no such optimiser (names the nearest), it needs more than gradients and parameters, or it
        has no momentum and `momentum` is not 0.

    Example:
      >>> optimizer = create_optimizer(
      ...     "sgd", learning_rate=0.1, lr_schedule="constant", steps=10, momentum=0.0, nesterov=False)
      >>> updates, _ = optimizer.update({"w": 2.0}, optimizer.init({"w": 1.0}))
      >>> print(updates["w"])
      -0.2
    """
    if name not in (names := _names()):
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
        raise InputError(f"learner.optimizer: optax has no optimiser {name!r}; {hint}")
    make = getattr(optax, name)
    options = _options(name, momentum, nesterov)
    try:
        optimizer = make(_rate(lr_schedule, learning_rate, steps), **options)
        params = jax.ShapeDtypeStruct((2, 2), "float32")
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
        if rate_by_gain:
            return follow_gain(lambda rate: make(rate, **options), _rate(lr_schedule, learning_rate, steps))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"optax.{name} cannot train with a {lr_schedule} rate from gradients and parameters alone ({error}): "
            f"choose another"
        ) from error
    return optimizer


def _options(name: str, momentum: float, nesterov: bool) -> dict[str, float | bool]:
    parameters = inspect.signature(getattr(optax, name)).parameters
    if "momentum" in parameters:
        options = {"momentum": momentum}
        return options | {"nesterov": nesterov and momentum > 0} if "nesterov" in parameters else options
    if "b1" in parameters:
        return {"b1": momentum}
    if momentum:
        raise InputError(f"optax.{name} has no momentum, got {momentum}: set --config.learner.momentum=0")
    return {}


def _rate(lr_schedule: str, learning_rate: float | jax.Array, steps: int) -> float | jax.Array | optax.Schedule:
    rates = {
        "constant": lambda: learning_rate,
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, steps),
    }
    return rates[lr_schedule]()


def _names() -> list[str]:
    """Returns the names of all functions of optax that make an optimiser from a learning rate."""
    names = []
    for name, member in vars(optax).items():
        is_helper = name.startswith(("_", "scale_by_"))
        if not is_helper and inspect.isfunction(member) and "learning_rate" in inspect.signature(member).parameters:
            names.append(name)
    return names

"""Any optax optimiser by name, with a learning-rate schedule."""

import difflib
import inspect

import jax
import optax

from issgd_jax.errors import InputError


def make_optimizer(
    name: str, *, learning_rate: float, lr_schedule: str, steps: int, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """The optimiser `optax.<name>`.

    lr_schedule: `constant`, or `cosine` or `linear` decay to 0 at `steps`. momentum: goes to `momentum`, or to `b1`
    where the optimiser has that instead. nesterov: used where the optimiser has momentum and this choice.

    Raises: InputError for a name that is no optax optimiser (with the nearest), for one that needs more than gradients
    and parameters, and for a momentum that the optimiser has no place for.
    """
    if name not in (names := _names()):
        near = difflib.get_close_matches(name, names, n=3)
        raise InputError(
            f"learner.optimizer: optax has no optimiser {name!r}; "
            f"{'did you mean ' + ' or '.join(near) if near else 'it has ' + ', '.join(names)}?"
        )
    make = getattr(optax, name)
    parameters = inspect.signature(make).parameters
    options = {}
    place = next((p for p in ("momentum", "b1") if p in parameters), None)
    if place:
        options[place] = momentum
    elif momentum:
        raise InputError(f"optax.{name} has no momentum, got {momentum}: set --config.learner.momentum=0")
    if place == "momentum" and "nesterov" in parameters:
        options["nesterov"] = nesterov and momentum > 0
    schedules = {
        "constant": lambda: learning_rate,
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, steps),
    }
    try:
        optimizer = make(schedules[lr_schedule](), **options)
        params = jax.ShapeDtypeStruct((2, 2), "float32")
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"optax.{name} cannot train with a {lr_schedule} rate from gradients and parameters alone ({error}): "
            f"choose another"
        ) from error
    return optimizer


def _names() -> list[str]:
    found = []
    for name, member in vars(optax).items():
        helper = name.startswith(("_", "scale_by_"))
        if not helper and inspect.isfunction(member) and "learning_rate" in inspect.signature(member).parameters:
            found.append(name)
    return found

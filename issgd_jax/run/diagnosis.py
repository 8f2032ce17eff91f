"""Errors that end a run, with what a person needs to go on: the step, the examples, the remedy."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from issgd_jax.console import say
from issgd_jax.errors import BadScoreError, InputError, NonFiniteLossError
from issgd_jax.files import write_text_atomically
from issgd_jax.sampling.store import Rejected

_REMEDY = (
    "Lower --config.learner.learning_rate, or bound the importance weights (--config.proposal.name=calibrated with "
    "uniform_fraction, or more smoothing), or skip such updates (--config.on_nonfinite=skip, which is biased)"
)


def nonfinite_loss(step: int, last_row: dict | None, resume_hint: str) -> NonFiniteLossError:
    """Returns the error for a training loss, of the whole split, that is not finite."""
    return NonFiniteLossError(_nonfinite_message("training loss", step, last_row, resume_hint), {"step": step})


def nonfinite_minibatch(
    step: int, minibatch: Any | None, uniform_draws: dict[int, Any], last_row: dict | None, resume_hint: str
) -> NonFiniteLossError:
    """Returns the error for a minibatch whose loss or gradient is not finite; it names the examples.

    Args:
      step: of the minibatch.
      minibatch: `learner.Minibatch`, those of no finite loss are named first; None after a uniform draw.
      uniform_draws: {step: Draw} of this step and of the one before it, where the draw was uniform.
      last_row: last row of metrics.
      resume_hint: see `resume_hint`.
    """
    message = _nonfinite_message("minibatch loss or gradient", step, last_row, resume_hint)
    batch = {"step": step, **_to_lists(minibatch or uniform_draws[step])}
    if not minibatch:
        previous = max(0, step - 1)
        batch["previous"] = {"step": previous, **_to_lists(uniform_draws[previous])}
        message += f". After uniform draws the gradient is not checked: the cause may lie in step {previous}"
    losses = batch.get("losses", [0.0] * len(batch["indices"]))
    examples = sorted(
        zip(batch["indices"], batch["importance_weights"], losses),
        key=lambda example: (math.isfinite(example[2]), -example[1] * example[2]),
    )
    worst = ", ".join(f"{index} ({importance_weight:.3g})" for index, importance_weight, _ in examples[:5])
    more = ", …" if len(examples) > 5 else ""
    return NonFiniteLossError(f"{message}. Its examples (importance weights): {worst}{more}", batch)


def raise_if_rejected(rejected: Rejected, step: int) -> None:
    """Raises BadScoreError, naming an example, if a score was rejected."""
    if rejected.count > 0:
        raise BadScoreError(
            f"{rejected.count} score(s) were NaN, infinite or negative up to step {step}, one of them of training "
            f"example {rejected.index}: correct its data or its loss, or have such scores skipped "
            "(--config.workers.strict=False)"
        )


def resume_hint(checkpoint_steps: list[int]) -> str:
    """Says where the same command resumes.

    Example:
      >>> resume_hint([1000, 2000])
      'the same command resumes from the checkpoint of step 2,000'
    """
    if jax.process_index():
        return "process 0 has the checkpoints"
    if not checkpoint_steps:
        return "there is no checkpoint"
    return f"the same command resumes from the checkpoint of step {checkpoint_steps[-1]:,}"


def _nonfinite_message(quantity: str, step: int, last_row: dict | None, hint: str) -> str:
    numbers = {k: v for k, v in (last_row or {}).items() if isinstance(v, int | float)}
    values = ", ".join(f"{k} {v:.6g}" for k, v in numbers.items()) or "none"
    remedy = _REMEDY if step else "Nothing was updated yet: look for NaN or infinite numbers in data and parameters"
    return f"the {quantity} is not finite at step {step}; last good metrics: {values}. {remedy}; {hint}"


def _to_lists(minibatch) -> dict[str, list]:
    names = "indices", "importance_weights", "losses"
    return {name: x.tolist() for name, x in zip(names, jax.device_get(tuple(minibatch)))}


def write_minibatch(error: NonFiniteLossError, path: pathlib.Path, check_lock: Callable[[], None]) -> None:
    """Writes what an error has of its minibatch; losses that are not finite, which JSON cannot hold, as text."""
    losses = error.batch.get("losses", [])
    batch = error.batch | ({"losses": [x if math.isfinite(x) else str(x) for x in losses]} if losses else {})
    try:
        check_lock()
        write_text_atomically(path, json.dumps(batch) + "\n")
    except (OSError, InputError) as problem:  # the error itself matters more
        say(f"{path} cannot be written: {problem}")

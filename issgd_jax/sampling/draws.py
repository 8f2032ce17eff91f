"""Kinds of draws, and what an update is given of them."""

import functools

import jax
import jax.numpy as jnp

from issgd_jax.limits import weights_and_limit, with_limit
from issgd_jax.sampling import table as table_lib
from issgd_jax.sampling import uniform
from issgd_jax.sampling import visits as visits_lib
from issgd_jax.sampling.checks import MAX_EXAMPLES, as_indices, as_numbers
from issgd_jax.sampling.table import Draw, Table
from issgd_jax.sampling.visits import Visits

STRIDE = "stride"
DRAWS = (*table_lib.METHODS, *uniform.EPOCHS, STRIDE)


def largest_minibatch(num_examples: int, draw: str) -> int:
    """Returns the largest minibatch that this kind of draw has from N examples; 2^30 with replacement.

    Example:
      >>> largest_minibatch(100, "shuffled"), largest_minibatch(100, "random_subset")
      (100, 33)
    """
    if draw == "random_subset":
        return num_examples // uniform.SUBSET
    return num_examples if draw in ("shuffled", "without_replacement", STRIDE) else MAX_EXAMPLES


def check_draw(draw: str, num_examples: int, batch_size: int) -> None:
    """Raises ValueError if there is no such kind of draw, or it has no minibatch of that size."""
    if draw not in DRAWS:
        raise ValueError(f"draw must be one of {', '.join(DRAWS)}, got {draw!r}")
    most = largest_minibatch(num_examples, draw)
    if batch_size < 1 or batch_size > most:
        raise ValueError(f"batch_size must be between 1 and {most:,} with draw {draw!r}, got {batch_size}")


@functools.partial(jax.jit, inline=True, static_argnames=("batch_size", "method"))
def draw_number(
    key: jax.Array, number: jax.Array, table: Table, batch_size: int, method: str
) -> tuple[jax.Array, Draw]:
    """Returns the number after this one, and the draw of this one: a function of its arguments alone."""
    key = jax.random.wrap_key_data(key)
    if method not in uniform.EPOCHS:
        return number + 1, table_lib.draw(jax.random.fold_in(key, number), table, batch_size, method)
    subset = method == "random_subset"
    indices = uniform.shuffled(key, number, table.num_examples, batch_size, subset=subset)
    return number + 1, Draw(indices, jnp.ones(batch_size, jnp.float32), table.num_examples)


def draw_earliest(
    visits: Visits, key: jax.Array, number: jax.Array, batch_size: int, ahead: jax.Array | None = None
) -> Draw:
    """Returns the draw of number `number` of evenly spaced visits, after the minibatches `ahead` i32[k, B]."""
    salt = uniform.mix_bits(jnp.ravel(key)[-1] ^ uniform.mix_bits(number.astype(jnp.uint32)))
    return Draw(*visits_lib.draw(visits, salt, batch_size, ahead), visits.num_examples)


def check_minibatch(
    drawn: Draw, norms, scores, num_examples: int, sampler_limit: float | None
) -> tuple[Draw, jax.Array | None, jax.Array | None]:
    """Returns what an update is given: the draw with i32[B] and f32[B], and norms and scores as f32[B]; or raises."""
    if not isinstance(drawn, Draw):
        raise TypeError(f"drawn must be a Draw, got {type(drawn).__name__}: pass what `draw` returned")
    if drawn.num_examples not in (None, num_examples):
        raise ValueError(
            f"the draw is of {drawn.num_examples:,} examples, the sampler of {num_examples:,}: pass a draw of "
            "this sampler"
        )
    if norms is None and scores is not None:
        raise ValueError("scores without norms: use ingest(state, indices, scores, scored_at, are_norms=False)")
    if drawn.importance_weights is None:
        raise ValueError(
            "the draw has no importance weights: for examples that this sampler did not draw, use "
            "ingest(state, indices, norms, scored_at=state.step)"
        )
    indices = as_indices(drawn.indices, num_examples)
    if indices.ndim != 1:
        raise ValueError(f"a draw must have indices of shape [B], got {indices.shape}: reshape the batch, not the draw")
    importance_weights, limit = weights_and_limit(drawn.importance_weights)
    if (limit is None) != (sampler_limit is None):
        raise ValueError(
            f"the draw has {'no' if limit is None else 'a'} limit, but limit is {sampler_limit}: pass the draw that "
            "`draw` returned"
        )
    if limit is not None and (norms is None or scores is not None):
        raise ValueError(
            "with a limit, update needs the norms, which tell what it has lowered, and takes them as the scores: pass "
            "norms alone"
        )
    arrays = {"importance_weights": importance_weights, "norms": norms, "scores": scores}
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != indices.shape:
            raise ValueError(
                f"{name} must have the shape of the draw, {indices.shape}, one for each of its examples, got "
                f"{jnp.shape(array)}"
            )
        if array is not None:
            arrays[name] = as_numbers(name, array, indices.shape)
    drawn = Draw(indices, with_limit(arrays["importance_weights"], limit), num_examples)
    return drawn, arrays["norms"], arrays["scores"]

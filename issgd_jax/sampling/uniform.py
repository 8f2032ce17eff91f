"""Uniform minibatches, as fast to draw as weighted ones: a slow baseline would flatter importance sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax import kernels

# A random subset holds one example in SUBSET, and serves for SUBSET epochs.
SUBSET = 3
# Draws that go through the examples, or a random subset of them, epoch by epoch.
EPOCHS = ("shuffled", "random_subset")
# Four rounds make a network of random functions pseudorandom; small networks mix less, so twice as many.
FEISTEL_ROUNDS = 8


def draw(key: jax.Array, num_examples: int, batch_size: int, method: str) -> jax.Array:
    """Draws examples uniformly; O(B), and O(B^2) without replacement.

    Args:
      key: random key.
      num_examples: N < 2^31.
      batch_size: B.
      method: "systematic", one example from each of B equal parts; "independent", with replacement;
        "without_replacement", every subset with the same probability.

    Returns:
      i32[B], where probabilities of examples differ by at most `N / 2^64`.
    """
    if method == "without_replacement":
        return _draw_subset(key, num_examples, batch_size)
    plain = functools.partial(plain_draw, impl=jax.random.key_impl(key), batch_size=batch_size)
    attributes = {"num_examples": np.int64(num_examples), "in_parts": np.bool_(method == "systematic")}
    if not kernels.supports_key(key):
        return plain(jax.random.key_data(key), **attributes)
    result = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return kernels.on_cpu("draw_uniform", plain, result, jax.random.key_data(key), **attributes)


def shuffled(key: jax.Array, step: jax.Array, num_examples: int, batch_size: int, subset: bool = False) -> jax.Array:
    """Returns one minibatch of shuffled epochs; O(B), without state.

    Each epoch has an order of its own, and leaves out the N modulo B examples that are last in it.

    Args:
      key: random key of all epochs.
      step: i32[], number of the minibatch.
      num_examples: N.
      batch_size: B.
      subset: whether epochs go over a random third of the examples, another one every three epochs.

    Returns:
      i32[B]. No example occurs twice in an epoch.

    Raises:
      ValueError: batch_size exceeds N, or its third with subset.

    Example:
      >>> epoch = [shuffled(jax.random.key(0), jnp.int32(step), num_examples=6, batch_size=2) for step in range(3)]
      >>> sorted(jnp.concatenate(epoch).tolist())
      [0, 1, 2, 3, 4, 5]
    """
    size = num_examples // SUBSET if subset else num_examples
    if batch_size > size:
        raise ValueError(f"an epoch of {size} examples has no minibatch of {batch_size}: lower it")
    batches, step = size // batch_size, jnp.asarray(step).astype(jnp.int32)
    epoch = step // batches
    positions = step % batches * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    positions = permute(jax.random.fold_in(key, epoch), positions, size)
    if not subset:
        return positions
    return permute(jax.random.fold_in(jax.random.fold_in(key, SUBSET), epoch // SUBSET), positions, num_examples)


def permute(key: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Maps positions in [0, size) by a random permutation: a Feistel network, repeated until the result is inside."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = jnp.uint32(2**half - 1)
    words = jax.random.bits(key, (FEISTEL_ROUNDS,), jnp.uint32)

    def network(x):
        left, right = x >> half, x & mask
        for word in words:
            left, right = right, left ^ (mix_bits(right ^ word) & mask)
        return left << half | right

    def walk(x):
        return jnp.where(x < size, x, network(x))

    walked = jax.lax.while_loop(lambda x: jnp.any(x >= size), walk, network(positions.astype(jnp.uint32)))
    return walked.astype(jnp.int32)


def mix_bits(x: jax.Array) -> jax.Array:
    """Returns words in which every bit depends on all bits (the finalizer of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def plain_draw(key_data, *, num_examples: int, in_parts: bool, impl, batch_size: int) -> jax.Array:
    """`draw` with replacement in plain JAX."""
    words = jax.random.bits(jax.random.wrap_key_data(key_data, impl=impl), (2, batch_size), jnp.uint32)
    cells = below(int(num_examples), *words)
    return spread(cells, int(num_examples), batch_size) if in_parts else cells


def below(limit: int | jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """Returns i32[...], uniform in [0, limit) up to limit / 2^64: the upper half of limit times 64 random bits."""
    limit = jnp.broadcast_to(jnp.asarray(limit).astype(jnp.uint32), high.shape)
    middle = high * limit
    carry = (middle + jax.lax.mulhi(low, limit) < middle).astype(jnp.uint32)
    return (jax.lax.mulhi(high, limit) + carry).astype(jnp.int32)


def spread(cells: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Returns one example i32[B] from each of B equal parts, where `cells` i32[B] or i32[1] in [0, N) say which.

    On a line of N * B cells, example n has B cells and part b has N.
    """
    starts = np.arange(batch_size, dtype=np.int64) * num_examples
    first, before = (starts // batch_size).astype(np.int32), (starts % batch_size).astype(np.int32)
    return first + (cells + before) // np.int32(batch_size)


def _draw_subset(key: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Returns a uniform subset by Floyd's algorithm (Bentley and Floyd 1987)."""
    last = num_examples - batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    candidate = below(last + 1, *jax.random.bits(key, (2, batch_size), jnp.uint32))

    def choose(i, chosen):
        is_taken = jnp.any(chosen == candidate[i])
        return chosen.at[i].set(jnp.where(is_taken, last[i], candidate[i]))

    return jax.lax.fori_loop(0, batch_size, choose, jnp.full(batch_size, -1, jnp.int32))

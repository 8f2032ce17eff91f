"""Stores, proposals and draws for tests; each program is compiled once for all tests of a process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax import kernels, sampling
from issgd_jax.sampling import ScoreStore


def make_store(score, scored_at=0):
    score = jnp.asarray(score, jnp.float32)
    return ScoreStore(score, jnp.broadcast_to(jnp.int32(scored_at), score.shape))


@jax.jit
def rebuild(proposal, state, store, step):
    """Returns the basis and the table of it."""
    basis = proposal.basis(state, store, step)
    return basis, proposal.table(basis, store, step)


@jax.jit
def observe(proposal, state, store, indices, norms, step):
    """Returns the state that has learned from norms[indices], with a new basis."""
    return proposal.observe(state, proposal.basis(state, store, step), store, indices, norms[indices], step)


def make_table(proposal, store, step, state=None):
    return rebuild(proposal, proposal.init() if state is None else state, store, jnp.int32(step))[1]


def compute_v(proposal, store, step, state=None):
    return np.asarray(make_table(proposal, store, step, state).v())


def second_moment(v, norms):
    return v.mean(dtype=float) * np.mean(norms.astype(float) ** 2 / v)


def learn(proposal, score, staleness, norms, sweeps=3):
    """State after re-scoring all examples some times, each time from `score`, `staleness` steps old, to `norms`."""
    store, step, norms = make_store(score), jnp.int32(staleness), jnp.asarray(norms, jnp.float32)
    state = proposal.init()
    for indices in np.array_split(np.random.default_rng(9).permutation(len(score)), 5) * sweeps:
        state = observe(proposal, state, store, jnp.asarray(indices, jnp.int32), norms, step)
    return state


def lognormal(size, sigma=1.0, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, size).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("batch_size", "method"))
def _draw_many(keys, table, *, batch_size, method):
    return jax.vmap(lambda key: sampling.draw(key, table, batch_size, method))(keys)


def draw_many(table, batch_size, count, seed=0, method="systematic"):
    """Draws `count` minibatches, each with a key of its own."""
    keys = jax.random.split(jax.random.key(seed), count)
    return _draw_many(keys, table, batch_size=batch_size, method=method)


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler: there are no kernels to compare")

"""Stores and proposals with given scores."""

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.sampling import ScoreStore


def store_of(score, scored_at=0):
    score = jnp.asarray(score, jnp.float32)
    return ScoreStore(score, jnp.broadcast_to(jnp.int32(scored_at), score.shape))


def table_of(proposal, store, step, state=None):
    step = jnp.int32(step)
    return proposal.table(proposal.basis(proposal.init() if state is None else state, store, step), store, step)


def v_of(proposal, store, step, state=None):
    return np.asarray(table_of(proposal, store, step, state).v())


def second_moment(v, norms):
    return v.mean(dtype=float) * np.mean(norms.astype(float) ** 2 / v)


def learn(proposal, score, staleness, norms, sweeps=3):
    """State after re-scoring all examples some times, each time from `score`, `staleness` steps old, to `norms`."""
    store, step, norms = store_of(score), jnp.int32(staleness), jnp.asarray(norms, jnp.float32)
    chunks = np.array_split(np.random.default_rng(9).permutation(len(score)), 5)

    @jax.jit
    def observe(state, indices):
        return proposal.observe(state, proposal.basis(state, store, step), store, indices, norms[indices], step)

    state = proposal.init()
    for indices in chunks * sweeps:
        state = observe(state, jnp.asarray(indices, jnp.int32))
    return state


def lognormal(size, sigma=1.0, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, size).astype(np.float32)

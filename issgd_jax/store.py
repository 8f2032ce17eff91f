"""The score database: one flat array on the learner's device."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1  # scored_at of an example that has no score yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """The last known gradient norm of every example and the age of the parameters that gave it.

    score: f32[N], the paper's probability weight; finite and >= 0, and 0 where never scored.
    scored_at: i32[N], learner step of those parameters; -1 = never scored.
    """

    score: jax.Array
    scored_at: jax.Array

    @classmethod
    def init(cls, num_examples: int) -> "ScoreStore":
        """An empty store: nothing scored yet. Raises ValueError if num_examples < 1."""
        if num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        return cls(
            score=jnp.zeros(num_examples, jnp.float32),
            scored_at=jnp.full(num_examples, NEVER, jnp.int32),
        )

    def write(self, indices: jax.Array, score: jax.Array, step: jax.Array) -> tuple["ScoreStore", jax.Array]:
        """Stores `score` f32[m] for the examples `indices` i32[m], measured with the parameters of `step`.

        Returns the new store and the number of scores rejected because they were NaN, infinite or negative: these leave
        the store as it was. Indices outside [0, N) are padding and ignored. A measurement with older parameters
        never replaces one with newer, in whatever order rounds arrive.
        """
        num_examples = self.score.shape[0]
        inside = (indices >= 0) & (indices < num_examples)
        valid = jnp.isfinite(score) & (score >= 0)
        newer = step >= self.scored_at[jnp.clip(indices, 0, num_examples - 1)]
        target = jnp.where(inside & valid & newer, indices, num_examples)
        store = ScoreStore(
            score=self.score.at[target].set(score.astype(jnp.float32), mode="drop"),
            scored_at=self.scored_at.at[target].set(jnp.asarray(step, jnp.int32), mode="drop"),
        )
        return store, jnp.sum(inside & ~valid, dtype=jnp.int32)

    @property
    def scored(self) -> jax.Array:
        """bool[N]: True where a score is known."""
        return self.scored_at != NEVER

    def staleness(self, step: jax.Array) -> jax.Array:
        """i32[N]: learner steps since the parameters that gave each score; `step + 1` where never scored."""
        return step - self.scored_at

    def save(self, path: str | pathlib.Path) -> None:
        """Writes both arrays to a `.npz` file."""
        np.savez(path, score=np.asarray(self.score), scored_at=np.asarray(self.scored_at))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "ScoreStore":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(score=jnp.asarray(arrays["score"]), scored_at=jnp.asarray(arrays["scored_at"]))

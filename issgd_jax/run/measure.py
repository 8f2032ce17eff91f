"""Measurements of a run: losses and errors of whole splits, the variance of the gradient, the state of the scores."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax.learning import evaluate, variance
from issgd_jax.run import histograms
from issgd_jax.sampling import Sampler, SamplerState, ScoreStore
from issgd_jax.scoring import scores
from issgd_jax.task.problem import SCORING_MICROBATCH, Problem


def make_measure(config: ConfigDict, problem: Problem, sampler: Sampler) -> Callable[..., dict[str, jax.Array]]:
    """Returns `(params, sampler_state, train_examples, test_examples) -> {metric: f[]}`, compiled.

    Args:
      config: of the run; `monitor.examples` of the training examples, always the same, measure the variance.
      problem: its loss and metrics. A loss that takes a key gets the same one for an example at every measurement.
      sampler: of the states; test_examples is None where there are none.
    """
    sample_size = min(config.monitor.examples, sampler.num_examples)
    sample = np.sort(np.random.default_rng(0).permutation(sampler.num_examples)[:sample_size]).astype(np.int32)
    loss_fn = problem.positional_loss
    metrics = {name: problem.on_keyed(metric) for name, metric in problem.metrics.items()}
    evaluate_split = evaluate.make_evaluate({"loss": loss_fn} | metrics)
    measure_variance = evaluate.make_measure_variance(loss_fn, scores.GradientNorm(loss_fn, SCORING_MICROBATCH))
    has_scores = config_lib.samples_by_importance(config)

    def with_keys(examples):
        size = jax.tree.leaves(examples)[0].shape[0]
        return (*examples, jax.random.split(jax.random.key(0), size)) if problem.keyed else examples

    def measure(params, sampler_state, train_examples, test_examples):
        splits = {"train": with_keys(train_examples)}
        if test_examples is not None:
            splits["test"] = with_keys(test_examples)
        means = {split: evaluate_split(params, examples) for split, examples in splits.items()}
        roots = measure_variance(
            params,
            sampler_state.table,
            splits["train"],
            sample,
            strides=_strides(sampler, sampler_state, sample),
            window=variance.WINDOW * sampler.batch_size,
        )
        measured = {
            **{f"{split}/{name}": mean for split, of_split in means.items() for name, mean in of_split.items()},
            **{f"variance/{name}": value for name, value in roots._asdict().items()},
            # A uniform minibatch of this size has the same variance.
            "variance/equivalent_batch": sampler.batch_size * roots.gain,
        }
        if not has_scores:
            return measured
        described = sampler.metrics(sampler_state)
        # The variance above is exact, where the sampler can only estimate.
        known = {name: value for name, value in described.items() if name not in ("gain", "equivalent_batch")}
        measured |= {f"scores/{name}": value for name, value in known.items()}
        store = sampler_state.store
        measured[histograms.SCORES] = _histogram(store.score, store.scored, histograms.SCORE_EDGES)
        staleness = sampler_state.step - store.scored_at
        measured[histograms.STALENESS] = _histogram(staleness, store.scored, histograms.STALENESS_EDGES)
        if number := min(config.log.tensorboard_images, sampler.num_examples):
            measured[histograms.HARDEST] = _hardest(sampler_state.store, number)
        return measured

    return jax.jit(measure)


def _hardest(store: ScoreStore, number: int) -> jax.Array:
    """Returns the examples i32[number] with the largest scores; -1 where fewer are scored."""
    scores, indices = jax.lax.top_k(jnp.where(store.scored, store.score, -1), number)
    return jnp.where(scores >= 0, indices, -1)


def _histogram(values: jax.Array, known: jax.Array, edges: tuple[float, ...]) -> jax.Array:
    """Returns how many of the known values [N], >= 0, lie in each bin, i32[bins]; all bins but the ends are octaves."""
    bins, first = len(edges) - 1, int(math.log2(edges[1]))
    # The exponent of a number is its octave: a sixth of the time of a search.
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    places = jnp.clip((bits >> 23) - 127 - first + 1, 0, bins - 1)
    return jnp.zeros(bins, jnp.int32).at[jnp.where(known, places, bins)].add(1, mode="drop")


def _strides(sampler: Sampler, state: SamplerState, indices: np.ndarray) -> jax.Array | None:
    """Returns the visits f32[m] between two visits of each example; None where minibatches are independent."""
    if state.visits is not None:
        return state.visits.strides(indices).astype(jnp.float32)
    return jnp.full(len(indices), sampler.num_examples, jnp.float32) if sampler.draw_method == "shuffled" else None


def measure_on(device: jax.Device, measure: Callable, problem: Problem, train_examples) -> Callable[..., dict]:
    """Returns `(params, sampler_state) -> {metric: number}`, measured on the device; it waits for the result."""
    test_examples = jax.device_put(problem.examples("test"), device)

    def measure_row(params, sampler_state) -> dict[str, float]:
        return to_row(jax.device_get(measure(params, sampler_state, train_examples, test_examples)))

    return measure_row


def to_row(measured: dict) -> dict[str, float | list[int]]:
    """Returns a row of metrics: numbers of arrays f[], and lists of arrays i32[k], without what is below 0, padding."""
    return {
        name: [n for n in value.tolist() if n >= 0] if value.ndim else value.item() for name, value in measured.items()
    }

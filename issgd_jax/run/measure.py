"""Measurements of a run: losses and errors of whole splits, the variance of the gradient, the state of the scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from issgd_jax import config as config_lib
from issgd_jax.learning import evaluate
from issgd_jax.sampling import SamplerState, effective_sample_size
from issgd_jax.task.problem import Problem, gradient_norm, minibatch_size


def make_measure(config: ConfigDict, problem: Problem) -> Callable[..., dict[str, jax.Array]]:
    """Returns `(params, sampler_state, step, train_examples, test_examples) -> {metric: f[]}`, compiled.

    Args:
      config: of the run; `monitor.examples` of the training examples, always the same, measure the variance.
      problem: loss, outcome and data.
    """
    num_examples = len(problem.train_data)
    sample_size = min(config.monitor.examples, num_examples)
    sample = np.sort(np.random.default_rng(0).permutation(num_examples)[:sample_size]).astype(np.int32)
    evaluate_split = evaluate.make_evaluate(problem.outcome_fn)
    measure_variance = evaluate.make_measure_variance(problem.loss_fn, gradient_norm(problem))
    has_scores = config_lib.samples_by_importance(config)

    def measure(params, sampler_state, step, train_examples, test_examples):
        train_loss, train_error = evaluate_split(params, train_examples)
        test_loss, test_error = evaluate_split(params, test_examples)
        roots = measure_variance(params, sampler_state.table, train_examples, sample)
        measured = {
            "train/loss": train_loss,
            "train/error": train_error,
            "test/loss": test_loss,
            "test/error": test_error,
            **{f"variance/{name}": value for name, value in roots._asdict().items()},
            # A uniform minibatch of this size has the same variance.
            "variance/equivalent_batch": minibatch_size(config) * roots.gain,
        }
        if not has_scores:
            return measured
        described = _describe_scores(sampler_state, step, minibatch_size(config))
        return measured | {f"scores/{name}": value for name, value in described.items()}

    return jax.jit(measure)


def measure_on(device: jax.Device, measure: Callable, problem: Problem, train_examples) -> Callable[..., dict]:
    """Returns `(params, sampler_state, step) -> {metric: number}`, measured on the device; it waits for the result."""
    test_examples = jax.device_put((problem.test_data.images, problem.test_data.labels), device)

    def measure_row(params, sampler_state, step) -> dict[str, float]:
        return to_row(jax.device_get(measure(params, sampler_state, step, train_examples, test_examples)))

    return measure_row


def to_row(measured: dict) -> dict[str, float]:
    """Returns a row of metrics as numbers of Python, from arrays f[]."""
    return {name: value.item() for name, value in measured.items()}


def _describe_scores(sampler_state: SamplerState, step: jax.Array, batch_size: int) -> dict[str, jax.Array]:
    store = sampler_state.store
    staleness = jnp.where(store.scored, store.staleness(step), 0)
    num_scored = jnp.sum(store.scored)
    return {
        "staleness_mean": jnp.sum(staleness) / jnp.maximum(num_scored, 1),
        "staleness_max": jnp.max(staleness),
        "scored_fraction": num_scored / len(store),
        "effective_sample_size": effective_sample_size(sampler_state.table, batch_size),
        "rejected": sampler_state.rejected.count,
    }

"""What importance sampling could gain on a model and its data, measured before anything is adopted."""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.gradnorm import per_example_grad_norms, positional_key, value_grad_and_norms
from issgd_jax.loading.source import arguments, as_source

# Parts of the sample whose mean gradients are compared; so many gradients are kept on the host.
PARTS = 8
# Repetitions of the bootstrap, and of each timing.
RESAMPLES, TIMINGS = 1000, 15
# Below these, draws by importance have little to gain.
LEAST_GAIN, LEAST_SHARE = 1.5, 0.2


class Estimate(NamedTuple):
    """A number, and the interval that holds 95 % of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclasses.dataclass(frozen=True)
class Potential:
    """What importance sampling could gain; `str` gives a table and the verdict.

    Attributes:
      uniform: √Tr Σ of one example's gradient under uniform draws, in units of the gradient.
      ideal: √Tr Σ under draws in proportion to the gradient norms, the least possible (paper, Theorem 1).
      gain: Tr uniform / Tr ideal, what scores that are never stale would give; infinite where the ideal has no
        variance, as of gradients that differ in length alone.
      noise_share: share of noise in the second moment of a uniform minibatch's gradient, Tr Σ / B over that and the
        square of the true gradient.
      norms_cost: time of the norms of a minibatch, in times of its loss and gradient.
      refresh_cost: time of losses, gradient and norms together, in the same.
      batch_size: B.
    """

    uniform: Estimate
    ideal: Estimate
    gain: Estimate
    noise_share: Estimate
    norms_cost: Estimate
    refresh_cost: Estimate
    batch_size: int

    @property
    def removable_share(self) -> float:
        """Share of a minibatch's second moment that the least noise would remove."""
        return self.noise_share.value * (1 - 1 / self.gain.value)

    @property
    def verdict(self) -> str:
        """Two sentences: whether to try it, and why."""
        known = (
            f"The least possible variance is {1 / self.gain.value:.0%} of uniform draws', and of the second moment of "
            f"a minibatch of {self.batch_size}, {self.noise_share.value:.0%} noise, the least noise would remove "
            f"{self.removable_share:.0%}, at {self.refresh_cost.value:.2f} of the time of a gradient."
        )
        if self.gain.low < LEAST_GAIN:
            return f"Importance sampling would not help these parameters: the gradients are of similar length. {known}"
        if self.removable_share < LEAST_SHARE:
            return f"Importance sampling would not help with this minibatch: its noise is small already. {known}"
        if self.removable_share < self.refresh_cost.low - 1:
            return f"Importance sampling would cost more than it saves on this device. {known}"
        return f"Importance sampling is worth a try. {known}"

    def __str__(self) -> str:
        names = {
            "√Tr Σ, uniform draws": self.uniform,
            "√Tr Σ, ideal draws": self.ideal,
            "gain of scores never stale": self.gain,
            f"share of noise, minibatch of {self.batch_size}": self.noise_share,
            "time of norms / gradient": self.norms_cost,
            "time of all three / gradient": self.refresh_cost,
        }
        width = max(map(len, names))
        return "\n".join([*(f"{name:<{width}}  {estimate}" for name, estimate in names.items()), "", self.verdict])


def potential(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    source: Any,
    *,
    batch_size: int,
    sample: int = 2048,
    seed: int = 0,
    collate: Callable[[list], Any] | None = None,
    keyed: bool = False,
) -> Potential:
    """Measures what importance sampling could gain for a model and its data, at these parameters, on this device.

    Pass parameters after an epoch or so of training: at first all examples teach about as much, and little would be
    gained; the gain grows as some are learned.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example.
      params: pytree of floating-point arrays.
      source: N >= 16 training examples on the host, see `loading.source.as_source`.
      batch_size: B, of the minibatch of which noise and times are told, in [1, N].
      sample: examples that are measured, drawn uniformly without replacement; at most N.
      seed: of the sample, of the bootstrap, and of the loss's keys.
      collate: see `as_source`.
      keyed: whether loss_fn takes a random key, `loss_fn(params, *example, key=key)`.

    Returns:
      Estimates with intervals, and a verdict.

    Raises:
      ValueError: batch_size, sample or the number of examples is out of range, or gradients are not finite.
      TypeError, ValueError: as `as_source` and `value_grad_and_norms`.

    Guarantees:
      Tr Σ and the square of the true gradient are unbiased, but that negative ones count as 0; their ratios are not.
      Eight gradients are held on the host.

    Source: √Tr Σ is that of Corollary 1 of the paper; the square of the gradient comes from products of means of
    different examples, as in McCandlish et al. 2018 (arXiv:1812.06162).

    Example:
      >>> rng = np.random.default_rng(0)
      >>> x = rng.standard_t(2, (512, 4)).astype(np.float32)
      >>> found = potential(lambda w, x: jnp.tanh(x @ w) ** 2, jnp.ones(4), x, batch_size=32)
      >>> found.gain.value > 1, found.ideal.value < found.uniform.value, found.verdict.startswith("Importance sampling")
      (True, True, True)
    """
    source = as_source(source, collate)
    num_examples = source.num_examples
    _check_whole("the number of examples", num_examples, 2 * PARTS)
    _check_whole("sample", sample, 2 * PARTS)
    _check_whole("batch_size", batch_size, 1, num_examples)
    size = min(sample, num_examples) // PARTS
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(num_examples)[: size * PARTS]
    options = {"key": jax.random.key(seed)} if keyed else {}
    norms, products = _measure(loss_fn, params, [source.gather(part) for part in np.split(chosen, PARTS)], options)
    if not (np.all(np.isfinite(norms)) and np.all(np.isfinite(products))):
        raise ValueError(
            f"{np.sum(~np.isfinite(norms))} of {norms.size} gradients are not finite: pass parameters at which all are"
        )
    moments = _bootstrap(norms, products, batch_size, rng)
    batch = arguments(jax.device_put(source.gather(rng.permutation(num_examples)[:batch_size])))
    return Potential(**moments, **_costs(loss_fn, params, batch, options, rng), batch_size=int(batch_size))


def _check_whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    if not isinstance(value, numbers.Integral) or not least <= value <= most:
        limit = f">= {least}" if most == math.inf else f"between {least} and {most}, the number of examples"
        raise ValueError(f"{name} must be a whole number {limit}, got {value!r}")


def _measure(loss_fn, params, parts: list, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns norms f64[M], and inner products f64[PARTS, PARTS] of the mean gradients of the parts."""
    step = value_grad_and_norms(loss_fn, keyed=bool(options))
    norms, gradients = [], []
    for part in parts:
        batch = arguments(part)
        ones = jnp.ones(jax.tree.leaves(batch)[0].shape[0])
        _, gradient, part_norms = step(params, ones, *batch, **options)
        norms.append(np.asarray(part_norms, np.float64))
        gradients.append([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(gradient)])
    products = [[sum(map(np.dot, x, y)) for y in gradients] for x in gradients]
    return np.concatenate(norms), np.asarray(products)


def _bootstrap(norms: np.ndarray, products: np.ndarray, batch_size: int, rng) -> dict[str, Estimate]:
    """Returns the estimates that follow from norms and products, with examples and parts drawn again and again."""

    def moments(norms, counts):
        pairs = np.outer(counts, counts) * (1 - np.eye(len(counts)))  # of different examples only: unbiased
        gradient = max(np.sum(pairs * products) / max(np.sum(pairs), 1), 0.0)
        uniform, ideal = np.mean(norms**2) - gradient, np.mean(norms) ** 2 - gradient
        uniform, ideal = max(uniform, 0.0), max(ideal, 0.0)
        noise = uniform / batch_size
        return {
            "uniform": float(uniform) ** 0.5,
            "ideal": float(ideal) ** 0.5,
            "gain": float(uniform / ideal) if ideal else math.inf if uniform else 1.0,
            "noise_share": float(noise / (noise + gradient)) if noise else 0.0,
        }

    draws = [
        moments(rng.choice(norms, norms.size), np.bincount(rng.integers(0, PARTS, PARTS), minlength=PARTS))
        for _ in range(RESAMPLES)
    ]

    def interval(name):
        values = [draw[name] for draw in draws]
        return np.quantile(
            values, (0.025, 0.975), method="nearest"
        ).tolist()  # between infinite gains there is no number

    return {name: Estimate(value, *interval(name)) for name, value in moments(norms, np.ones(PARTS)).items()}


def _costs(loss_fn, params, batch: tuple, options: dict, rng) -> dict[str, Estimate]:
    """Returns the times of norms, and of all three, over that of loss and gradient, measured in turn."""
    size = jax.tree.leaves(batch)[0].shape[0]
    keyed = bool(options)

    def mean_loss(params, *batch, key=None):
        if keyed:
            batch = (*batch, jax.random.split(key, size))
        example_loss = positional_key(loss_fn) if keyed else loss_fn
        return jnp.mean(jax.vmap(lambda *example: example_loss(params, *example))(*batch))

    calls = {
        "gradient": (jax.jit(jax.value_and_grad(mean_loss)), (params, *batch)),
        "norms_cost": (per_example_grad_norms(loss_fn, keyed=keyed), (params, *batch)),
        "refresh_cost": (value_grad_and_norms(loss_fn, keyed=keyed), (params, jnp.ones(size), *batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(TIMINGS + 1):
        for name, (function, args) in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*args, **options))
            if repetition:  # the first compiles
                seconds[name].append(time.perf_counter() - began)

    def ratio(name):
        ratios = np.array(seconds[name]) / np.array(seconds["gradient"])
        medians = np.median(rng.choice(ratios, (RESAMPLES, TIMINGS)), axis=1)
        return Estimate(float(np.median(ratios)), *np.quantile(medians, (0.025, 0.975)).tolist())

    return {name: ratio(name) for name in calls if name != "gradient"}

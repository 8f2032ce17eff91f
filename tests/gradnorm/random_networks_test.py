"""Norms of random networks against a float64 loop of `jax.grad`.

Red if a rule holds only for the axis orders, sizes, strides, nesting or sharing of parameters that are usual in code
written by hand. A few fixed networks for each kind of layer; in a soak more, of a seed that pytest prints.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from jax import lax

from tests.gradnorm.helpers import assert_close, normalized, reference, scalar_loss, transformed
from tests.helpers import soak, soak_seed


class Network:
    """Draws layers, functions `(params, x) -> y` of arrays of any shape, and the shapes of their parameters."""

    def __init__(self, draw):
        self.draw = draw
        self.parameter_shapes = []

    def integer(self, least, most):
        return self.draw(st.integers(least, most))

    def one_of(self, choices):
        return self.draw(st.sampled_from(choices))

    def parameter(self, *shape):
        """Returns `params -> array`: a new parameter, an earlier one, or entries of an earlier one."""
        size = math.prod(shape)
        earlier = [i for i, other in enumerate(self.parameter_shapes) if math.prod(other) >= size]
        i = self.one_of([None, None, *earlier])
        if i is None:
            i = len(self.parameter_shapes)
            self.parameter_shapes.append(shape)
        if self.parameter_shapes[i] == shape:
            return lambda p: p[i]
        return lambda p: p[i].ravel()[:size].reshape(shape)

    def layer(self, shape, depth, draw_layer=None):
        if draw_layer is None:
            layers = LAYERS | (NESTED if depth else {})
            draw_layer = self.one_of([layer for layer, least_rank in layers.items() if len(shape) >= least_rank])
        return draw_layer(self, shape, depth - 1) if draw_layer in NESTED else draw_layer(self, shape)

    def layers(self, shape, most, depth, first=None):
        """Draws a chain of layers with sines between them: smooth and bounded, so that rounding errors do not grow."""
        chain = []
        for i in range(self.integer(1, most)):
            chain.append(self.layer(shape, depth, first if i == 0 else None))
            params = [jnp.zeros(s) for s in self.parameter_shapes]
            shape = jax.eval_shape(chain[-1], params, jnp.zeros(shape)).shape

        def apply(p, x):
            for layer in chain:
                x = jnp.sin(layer(p, x))
            return x

        return apply


def scale_and_shift(net, shape):
    broadcast = [net.one_of([1, size]) for size in shape]
    scale, shift = net.parameter(*broadcast), net.parameter(*shape[net.integer(0, len(shape)) :])
    return lambda p, x: x * scale(p) + shift(p)


def einsum(net, shape):
    """Draws an einsum: axes of x are kept, summed or shared with the parameter, others are new, in any order."""
    names = "abcd"[: len(shape)]
    roles = {name: net.one_of(["kept", "summed", "shared"]) for name in names}
    sizes = dict(zip(names, shape)) | {name: net.integer(1, 3) for name in "yz"[: net.integer(0, 4 - len(shape))]}
    of_w = "".join(net.draw(st.permutations([name for name in sizes if roles.get(name) != "kept"])))
    of_y = "".join(net.draw(st.permutations([name for name in sizes if roles.get(name) != "summed"])))
    w = net.parameter(*(sizes[name] for name in of_w))
    fan_in = math.prod(sizes[name] for name in names if roles[name] == "summed")
    w_first = net.one_of([False, True])

    def apply(p, x):
        if w_first:
            y = jnp.einsum(f"{of_w},{names}->{of_y}", w(p), x)
        else:
            y = jnp.einsum(f"{names},{of_w}->{of_y}", x, w(p))
        return jnp.atleast_1d(y) / math.sqrt(fan_in)

    return apply


def convolution(net, shape):
    *image, channels = shape
    kernel = [net.integer(1, 3) for _ in image]
    strides, dilation, input_dilation = ([net.integer(1, 2) for _ in image] for _ in range(3))
    groups = net.one_of([g for g in range(1, channels + 1) if channels % g == 0])
    low = [net.integer(-1, 2) for _ in image]
    # Enough padding for one window.
    missing = [
        max(0, (k - 1) * d + 1 - ((n - 1) * i + 1 + left))
        for n, k, d, i, left in zip(image, kernel, dilation, input_dilation, low)
    ]
    padding = [(left, least + net.integer(0, 2)) for left, least in zip(low, missing)]
    # With (-1, 1), XLA's convolution reads foreign memory on CPUs (openxla/xla#48713).
    padding = [(-1, 2) if pair == (-1, 1) else pair for pair in padding]
    w = net.parameter(*kernel, channels // groups, groups * net.integer(1, 2))
    axes = "xyz"[: len(image)]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    fan_in = math.prod(kernel) * channels // groups

    def apply(p, x):
        y = lax.conv_general_dilated(x[None], w(p), strides, padding, input_dilation, dilation, numbers, groups)
        return y[0] / math.sqrt(fan_in)

    return apply


def embedding(net, shape):
    """Draws a table and looks up tokens computed from x, some of them out of range."""
    table = net.parameter(5, shape[-1])
    mode = net.one_of(["clip", "wrap", "fill"])

    def apply(p, x):
        tokens = jnp.rint(6 * x[..., 0]).astype(int)
        return x + jnp.take(table(p), tokens, axis=0, mode=mode, fill_value=0)

    return apply


def layer_norm(net, shape):
    axes = tuple(axis for axis in range(len(shape)) if net.one_of([True, False]))
    return lambda p, x: normalized(x, axes)


def rearrange(net, shape):
    axes, size = net.draw(st.permutations(range(len(shape)))), math.prod(shape)
    rows = net.one_of([None, *(n for n in range(1, size + 1) if size % n == 0)])
    return lambda p, x: x.transpose(axes) if rows is None else x.transpose(axes).reshape(rows, -1)


def residual(net, shape, depth):
    branch = net.layers(shape, 2, depth)
    return lambda p, x: x + jnp.resize(branch(p, x), x.shape)


def wrapped(net, shape, depth):
    return net.one_of([jax.jit, jax.checkpoint])(net.layers(shape, 2, depth))


def vmap(net, shape, depth):
    layers = net.layers(shape[1:], 2, depth)
    return lambda p, x: jax.vmap(layers, (None, 0))(p, x).reshape(len(x), -1)


def cond(net, shape, depth):
    yes = net.layers(shape, 2, depth)
    no = net.one_of([lambda p, x: x, net.layers(shape, 2, depth)])

    def apply(p, x):
        branches = [lambda branch=branch: jnp.resize(branch(p, x), x.shape) for branch in (yes, no)]
        return lax.cond(x.ravel()[0] > 0.1, *branches)

    return apply


def scan(net, shape, depth):
    """Draws a recurrence along the first axis, with parameters shared by all steps and one for each step."""
    length, *rest = shape
    cell = net.layers(tuple(rest), 2, depth)
    start, steps = net.parameter(*rest), net.parameter(length, *rest)
    reverse, unroll = net.one_of([False, True]), net.integer(1, 3)

    def apply(p, x):
        def step(state, x_and_w):
            y = cell(p, jnp.sin(state + x_and_w[0] * x_and_w[1]))
            return jnp.resize(y, state.shape), y

        return lax.scan(step, start(p), (x, steps(p)), reverse=reverse, unroll=unroll)[1].reshape(length, -1)

    return apply


def repeat(net, shape, depth):
    body, times = net.layers(shape, 2, depth), net.integer(0, 3)
    return lambda p, x: lax.fori_loop(0, times, lambda _, y: jnp.resize(body(p, y), y.shape), x)


# The least rank of array that each layer accepts.
LAYERS = {einsum: 1, convolution: 2, embedding: 1, scale_and_shift: 1, layer_norm: 1, rearrange: 1}
NESTED = {residual: 1, wrapped: 1, vmap: 2, cond: 1, scan: 2, repeat: 1}


@st.composite
def problems(draw, first_layer):
    """Draws `(loss_fn, params, importance_weights, batch)`."""
    net = Network(draw)
    least_rank = (LAYERS | NESTED)[first_layer]
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=least_rank, max_size=3)))
    scale, apply = net.parameter(*shape), net.layers(shape, 3, 2, first_layer)
    rng, size = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(1, 4))
    params = [rng.normal(size=s).astype(np.float32) for s in net.parameter_shapes]
    importance_weights, x = (
        rng.uniform(0.1, 3, size).astype(np.float32),
        rng.normal(size=(size, *shape)).astype(np.float32),
    )
    return lambda p, x: scalar_loss(apply(p, x * scale(p))), params, importance_weights, [x]


@pytest.mark.parametrize("first_layer", [*LAYERS, *NESTED], ids=lambda layer: layer.__name__)
@seed(soak_seed())
@settings(
    deadline=None,
    max_examples=soak(2, 12),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_equals_a_loop(first_layer, data):
    loss_fn, params, _, (x,) = problem = data.draw(problems(first_layer))
    note(str(jax.make_jaxpr(loss_fn)(params, x[0])))
    expected = reference(*problem)
    for dtype, rtol in (np.float64, 1e-10), (np.float32, 1e-5):
        assert_close(transformed(*problem, dtype), expected, rtol, rtol)

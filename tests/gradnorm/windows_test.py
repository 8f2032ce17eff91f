"""Norms of convolutions' gradients by the CPU kernel: those of jax.grad, for windows of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax import kernels
from issgd_jax.gradnorm import per_example_grad_norms, windows
from tests.helpers import soak

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler: there are no kernels to compare")
NAMES = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def calls(monkeypatch):
    """Gradients that were given to the kernel."""
    given, squared_norms = [], windows.squared_norms
    monkeypatch.setattr(windows, "squared_norms", lambda *args: given.append(args) or squared_norms(*args))
    return given


def data(shape, *, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def convolved(kernel, image, names=NAMES, **options):
    return jax.lax.conv_general_dilated(
        image[None], kernel, **{"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": names} | options
    )


def conv_loss(kernel, image, names=NAMES, **options):
    return jnp.sum(jnp.sin(convolved(kernel, image, names, **options)))


def exact_norms(loss, kernel, images):
    with jax.enable_x64(True):
        kernel, images = (np.asarray(x, np.float64) for x in (kernel, images))
        return np.array([np.linalg.norm(np.ravel(jax.grad(loss)(kernel, image))) for image in images])


def check(loss, kernel, images):
    norms = per_example_grad_norms(loss)(kernel, images)
    np.testing.assert_allclose(norms, exact_norms(loss, kernel, images), rtol=2e-6)


SIDE = st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(-1, 3), st.integers(-1, 3)
)


@pytest.mark.parametrize(("up", "down"), [(1e35, 1e-15), (1e-33, 1e16), (1e-35, 1e18), (1e33, 1e-13)])
def test_huge_images_with_tiny_derivatives_and_the_reverse(up, down, calls):
    """Red if the second pass scales one of the two alone, which then leaves the range of numbers itself."""
    kernel, images, slopes = data((3, 3, 4, 8), seed=1), data((2, 12, 12, 4)), data((1, 12, 12, 8), seed=2)

    def loss(kernel, image, up=1.0, down=1.0):
        return jnp.float32(down) * jnp.vdot(slopes, convolved(kernel, image * jnp.float32(up)))

    norms = per_example_grad_norms(functools.partial(loss, up=up, down=down))(kernel, images)
    np.testing.assert_allclose(norms / (up * down), exact_norms(loss, kernel, images), rtol=2e-5)
    assert calls


def test_a_kernel_in_float32_beside_a_leaf_in_float64(calls):
    """Red if the second pass, here of an image of zeros, scales the image in the wider type, which no kernel has."""
    with jax.enable_x64(True):
        params = {"kernel": data((3, 3, 4, 8), seed=1).astype(jnp.float32), "bias": jnp.ones(8, jnp.float64)}
        images = data((3, 6, 6, 4)).astype(jnp.float32) * jnp.array([1, 0, 1e-30], jnp.float32)[:, None, None, None]

        def loss(params, image):
            return jnp.sum(jnp.sin(convolved(params["kernel"], image) + params["bias"]))

        norms = per_example_grad_norms(loss, per_leaf=True)(params, images)
        gradients = [jax.grad(loss)(params, image) for image in images]
    for name in params:
        exact = [np.linalg.norm(np.ravel(np.asarray(gradient[name], np.float64))) for gradient in gradients]
        np.testing.assert_allclose(norms[name], exact, rtol=1e-5)
    assert calls


@settings(deadline=None, max_examples=soak(12, 200))
@given(sides=st.tuples(SIDE, SIDE), channels=st.integers(1, 5), features=st.sampled_from([1, 3, 16, 33]))
def test_windows_of_every_kind(sides, channels, features):
    """Red if strides, dilation, or padding on one side, also a negative one, are mixed up, or a column is left over.

    The loss is linear, so that its value is not computed: where padding is negative on one side and positive on the
    other, XLA's convolution reads foreign memory on CPUs (openxla/xla#48713).
    """
    lengths, kernel, strides, dilation, *paddings = zip(*sides)
    padding = tuple(zip(*paddings))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    if any(length + sum(pad) < r for length, pad, r in zip(lengths, padding, reach)):
        return
    options = {"window_strides": strides, "padding": padding, "rhs_dilation": dilation}
    kernel, images = data((*kernel, channels, features), seed=1), data((3, *lengths, channels))
    cotangent = data(jax.eval_shape(lambda: convolved(kernel, images[0], **options)).shape, seed=2)

    def loss(kernel, image, cotangent=cotangent):
        return jnp.vdot(cotangent, convolved(kernel, image, **options))

    norms = per_example_grad_norms(loss)(kernel, images)
    without_signs = exact_norms(functools.partial(loss, cotangent=jnp.abs(cotangent)), kernel, jnp.abs(images))
    difference = np.abs(norms - exact_norms(loss, kernel, images))
    assert np.all(difference <= 2e-6 * without_signs), (norms, difference)


@pytest.mark.parametrize("names", [NAMES, ("NCHW", "OIHW", "NCHW")], ids=["flax", "equinox"])
def test_the_kernel_is_used_in_the_layouts_of_frameworks(names, calls):
    """Red if a layer of a framework is not recognised, so that nothing is gained."""
    shapes = ((3, 3, 4, 8), (2, 6, 7, 4)) if names == NAMES else ((8, 4, 3, 3), (2, 4, 6, 7))
    check(lambda kernel, image: conv_loss(kernel, image, names), *map(data, shapes))
    assert calls


def test_groups_two_uses_and_other_types_are_left_to_plain_jax(calls):
    """Red if the kernel is given what it does not know."""
    kernel, images = data((3, 3, 4, 8)), data((2, 6, 6, 4))
    check(lambda k, x: conv_loss(k, x, feature_group_count=2), kernel[:, :, :2], images)
    check(lambda k, x: conv_loss(k, x) + conv_loss(k, 2 * x[::-1]), kernel, images)
    check(lambda k, x: conv_loss(k, x, lhs_dilation=(2, 2), padding=((1, 1), (1, 1))), kernel, images)
    per_example_grad_norms(conv_loss)(kernel.astype(jnp.bfloat16), images.astype(jnp.bfloat16))
    assert not calls


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1e20])
def test_norms_whose_squares_are_no_numbers(scale, calls):
    check(lambda k, x: scale * conv_loss(k, x), data((3, 3, 2, 8)), data((3, 6, 6, 2)))
    assert calls


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_example(bad):
    images = data((3, 6, 6, 2)).at[1, 2, 3, 0].set(bad)
    norms = np.asarray(per_example_grad_norms(conv_loss)(data((3, 3, 2, 8)), images))
    assert np.isfinite(norms).tolist() == [True, False, True]


def test_it_can_be_derived_mapped_and_split():
    """Red if there is no derivative, or a batch is given to the kernel as one example."""
    kernel, images = data((3, 3, 2, 8)), data((2, 3, 5, 5, 2))
    norms = per_example_grad_norms(conv_loss)
    together = jax.vmap(norms, (None, 0))(kernel, images)
    np.testing.assert_allclose(together, [norms(kernel, x) for x in images], rtol=1e-6)
    small = per_example_grad_norms(conv_loss, microbatch_size=1)
    np.testing.assert_allclose(small(kernel, images[0]), together[0], rtol=1e-6)
    gradient = jax.grad(lambda kernel: jnp.sum(norms(kernel, images[0])))(kernel)
    step = 1e-3 * data(kernel.shape, seed=2)
    ahead, behind = (jnp.sum(norms(kernel + sign * step, images[0])) for sign in (1, -1))
    np.testing.assert_allclose(jnp.vdot(gradient, step), (ahead - behind) / 2, rtol=1e-2)


GOOD = [3, 3, 4, 4, 1, 1, 1, 1, 1, 1]
IMAGE, RIGHT = (2, 4, 4, 3), (2, 16, 8)


@pytest.mark.parametrize(
    ("image", "right", "size", "geometry"),
    [
        (IMAGE[:3], RIGHT, 2, GOOD),
        (IMAGE, (2, 15, 8), 2, GOOD),
        (IMAGE, (1, 16, 8), 2, GOOD),
        (IMAGE, RIGHT, 3, GOOD),
        (IMAGE, RIGHT, 2, GOOD[:9]),
        (IMAGE, (2, 16, 0), 2, GOOD),
        *((IMAGE, RIGHT, 2, [*GOOD[:i], bad, *GOOD[i + 1 :]]) for i, bad in ((0, 0), (4, 0), (6, -1), (8, 2**40))),
        (IMAGE, RIGHT, 2, [3, 3, 4, 4, 1, 1, 2**23, 1, 1, 1]),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(image, right, size, geometry):
    """Red if it trusts its caller: what it then reads is the memory of others."""
    call = jax.ffi.ffi_call("issgd_jax_convolution_squares", jax.ShapeDtypeStruct((size,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the kernel of convolutions needs"):
        call(jnp.zeros(image), jnp.zeros(right), geometry=np.array(geometry, np.int64))

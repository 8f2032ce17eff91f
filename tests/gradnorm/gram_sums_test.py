"""Kernels of sums over pairs of uses, interpreted, against float64 and the plain form; which of them a program gets."""

import functools
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from issgd_jax.gradnorm import gram_sums as gram
from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.gradnorm.gram_sums import gram_sums
from issgd_jax.kernels import gram_hopper, gram_tpu, tiles
from tests.helpers import soak

INTERPRETS_HOPPER = hasattr(plgpu, "InterpretGPUParams")  # JAX 0.10 has an interpreter that does not transpose tiles
KERNELS = [
    pytest.param(functools.partial(gram_tpu.gram_sums, interpret=True), id="tpu"),
    pytest.param(
        functools.partial(gram_hopper.gram_sums, interpret=plgpu.InterpretGPUParams() if INTERPRETS_HOPPER else None),
        id="hopper",
        marks=pytest.mark.skipif(not INTERPRETS_HOPPER, reason="this version of JAX cannot interpret it"),
    ),
]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Several tiles of small arrays; on Hopper, tiles are of one size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_tpu, "LARGEST_TILE", 16)
        patch.setattr(gram_tpu, "LARGEST_CHUNK", 128)
        yield


def factors(shape, dtype, magnitude=0.0):
    batch, uses, *sides = shape
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(batch, uses, side)) for side in sides)
    return jnp.asarray(left * 10.0**magnitude, dtype), jnp.asarray(right, dtype)


def oracle(left, right, least=0.0):
    left, right = (np.asarray(x.astype(jnp.float32), np.float64) for x in (left, right))
    left, right = (x @ x.swapaxes(1, 2) for x in (left, right))
    absolute = np.maximum(np.abs(left), least) * np.maximum(np.abs(right), least)
    return np.stack([np.sum(left * right, axis=(1, 2)), np.sum(absolute, axis=(1, 2))])


@pytest.mark.parametrize("kernel", KERNELS)
@example(shape=(1, 1, 1, 1), dtype="float32", magnitude=0, least=0.0)
@example(shape=(2, 150, 3, 140), dtype="float32", magnitude=5, least=0.0)
@example(shape=(1, 33, 257, 2), dtype="bfloat16", magnitude=-12, least=1e-23)
@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 140)] * 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    magnitude=st.integers(-12, 6),
    least=st.sampled_from([0.0, 1e-23]),
)
@settings(max_examples=soak(1, 20), deadline=None)
def test_a_kernel_sums_all_pairs(kernel, shape, dtype, magnitude, least):
    """Red if a pair is left out or counts twice, padding adds, or sums are not in float32."""
    left, right = factors(shape, dtype, magnitude=magnitude)
    sums = np.asarray(kernel(left, right, precision=None, least=least), float)
    expected = oracle(left, right, least)
    assert np.all(np.abs(sums - expected) <= 1e-5 * expected[1]), (sums, expected)
    ours = gram.plain(left, right, precision=None, least=least)
    np.testing.assert_allclose(sums, ours, rtol=1e-5, atol=1e-5 * np.max(expected[1]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_stays_so_in_its_example(kernel):
    """Red if a tile hides a number that is not finite, or passes it on to another example."""
    left, right = factors((4, 20, 3, 5), "float32")
    left, right = left.at[0, 3, 1].set(jnp.nan).at[1, 19, 2].set(jnp.inf), right.at[2, 0, 0].set(-jnp.inf)
    # Not of the absolute sum: XLA's CPU backend takes the maximum of nan and a number within a sum for the number.
    signed, _ = kernel(left, right, precision=None, least=0.0)
    assert np.isfinite(signed).tolist() == [False, False, False, True]


def test_tiles_on_a_tpu_do_not_race(capfd):
    """Red if a step of the grid reads or writes what another one writes, or reads what nobody wrote."""
    left, right = factors((2, 20, 130, 3), "float32")
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    sums = gram_tpu.gram_sums(left, right, precision=None, least=0.0, interpret=interpret)
    np.testing.assert_allclose(sums, oracle(left, right), rtol=1e-5)
    assert "race" not in "".join(capfd.readouterr()).lower()


@pytest.mark.skipif(not INTERPRETS_HOPPER, reason="this version of JAX cannot interpret it")
def test_warpgroups_do_not_race():
    """Red if a tile is read before it is copied, copied over before it is multiplied, or waited for in vain."""
    left, right = factors((1, 130, 300, 40), "bfloat16")
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    sums = gram_hopper.gram_sums(left, right, precision=None, least=0.0, interpret=interpret)
    np.testing.assert_allclose(sums, oracle(left, right), rtol=1e-5)


def custom_calls(function, *args, platform):
    """Returns the names of the custom calls of a program that is lowered for a platform that is not here."""
    # A function of its own: what was traced before is not traced again when the switch is another.
    exported = jax.export.export(jax.jit(lambda *args: function(*args)), platforms=(platform,))(*args)
    return set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module()))


SHAPES = [jax.ShapeDtypeStruct((2, 300, side), jnp.bfloat16) for side in (40, 70)]


@pytest.mark.parametrize(
    ("form", "platform", "expected"),
    [
        ("", "tpu", set()),  # as long as it has not been run on one
        ("auto", "tpu", {"tpu_custom_call"}),
        ("tpu", "tpu", {"tpu_custom_call"}),
        ("plain", "tpu", set()),
        ("auto", "cuda", set()),  # no GPU tells that it is Hopper
        ("hopper", "cuda", {"mosaic_gpu_v2"}),
        ("plain", "cuda", set()),
        ("auto", "cpu", set()),
    ],
)
def test_the_platform_and_the_switch_choose_the_form(monkeypatch, form, platform, expected):
    """Red if a platform gets a kernel that it cannot run, or the switch does not force one."""
    monkeypatch.setenv(gram.SWITCH, form)
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes = [x.update(dtype=dtype) for x in SHAPES]
        assert custom_calls(gram_sums, *shapes, platform=platform) == expected


@pytest.mark.parametrize(
    ("form", "function", "args"),
    [
        ("auto", gram_sums, [x.update(shape=(2, gram.LEAST_USES - 1, 8)) for x in SHAPES]),
        ("tpu", gram_sums, [x.update(dtype=jnp.float16) for x in SHAPES]),
        ("tpu", functools.partial(gram_sums, precision="high"), [x.update(dtype=jnp.float32) for x in SHAPES]),
        ("tpu", jax.grad(lambda a, d: jnp.sum(gram_sums(a, d)[0])), SHAPES),
    ],
    ids=["few uses", "float16", "three passes", "derivative"],
)
def test_what_no_kernel_does_is_plain(monkeypatch, form, function, args):
    """Red if a kernel is chosen for a type, a precision, few uses or a derivative that it does not give."""
    monkeypatch.setenv(gram.SWITCH, form)
    assert not custom_calls(function, *args, platform="tpu")


@pytest.mark.parametrize("form", ["hopper", "fast"])
def test_a_form_that_cannot_be_is_refused(monkeypatch, form):
    monkeypatch.setenv(gram.SWITCH, form)
    with pytest.raises(ValueError, match=form) as error:
        custom_calls(gram_sums, *SHAPES, platform="cpu")
    assert "plain" in str(error.value)


def test_a_kernel_that_cannot_be_lowered_is_replaced(monkeypatch, caplog):
    """Red if a version of JAX without Pallas ends a program, or nothing is said about it."""
    monkeypatch.setenv(gram.SWITCH, "auto")
    monkeypatch.setitem(sys.modules, "issgd_jax.kernels.gram_tpu", None)
    with caplog.at_level(logging.WARNING, "issgd_jax"):
        assert not custom_calls(gram_sums, *SHAPES, platform="tpu")
    assert gram.SWITCH in caplog.text


def test_devices_that_share_a_program_share_no_kernel(monkeypatch):
    """Red if a batch that the compiler spreads meets a kernel, or one that is spread by hand does not."""
    monkeypatch.setenv(gram.SWITCH, "auto")
    mesh = Mesh(jax.devices()[:2], ("data",))
    spec = PartitionSpec("data")
    sharded = [x.update(sharding=jax.sharding.NamedSharding(mesh, spec)) for x in SHAPES]
    assert "tpu_custom_call" not in custom_calls(gram_sums, *sharded, platform="tpu")
    for check in (True, False):
        by_hand = jax.shard_map(gram_sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
        assert "tpu_custom_call" in custom_calls(by_hand, *sharded, platform="tpu")
    by_device = jax.pmap(gram_sums, devices=jax.devices()[:2])
    shapes = [x.update(shape=(2, *x.shape)) for x in SHAPES]
    assert "tpu_custom_call" in custom_calls(by_device, *shapes, platform="tpu")


def test_norms_by_a_kernel_are_those_of_the_plain_form(monkeypatch):
    """Red if norms under jit, vmap, pmap or shard_map get other sums of the kernel; interpreted on a CPU."""
    monkeypatch.setenv(gram.SWITCH, "tpu")
    monkeypatch.setattr("issgd_jax.gradnorm.cost.by_gram", lambda *_: True)
    monkeypatch.setattr(gram, "plain", None)  # the kernel, not its replacement
    x, slopes = factors((4, 20, 3, 2), "float32")
    w = jnp.ones((3, 2))
    norms = per_example_grad_norms(lambda w, x, slopes: jnp.sum((x @ w) * slopes))
    expected = np.linalg.norm(np.einsum("bti,btj->bij", x, slopes), axis=(1, 2))
    mesh, spec = Mesh(jax.devices()[:2], ("data",)), PartitionSpec("data")
    halves = [y.reshape(2, 2, *y.shape[1:]) for y in (x, slopes)]
    for result in (
        norms(w, x, slopes),
        jax.vmap(norms, (None, 0, 0))(w, *halves).ravel(),
        jax.pmap(norms, in_axes=(None, 0, 0))(w, *halves).ravel(),
        jax.shard_map(norms, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec)(w, x, slopes),
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_derivatives_are_those_of_the_plain_form(monkeypatch):
    monkeypatch.setenv(gram.SWITCH, "tpu")
    left, right = factors((2, 20, 3, 5), "float32")
    found = jax.grad(lambda a: jnp.sum(gram_sums(a, right)[0]))(left)
    gram_of_right = np.einsum("bsj,btj->bst", right, right)
    np.testing.assert_allclose(found, 2 * np.einsum("bst,bti->bsi", gram_of_right, left), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "platform"), [("tpu", "tpu"), ("hopper", "cuda"), ("plain", "cuda")])
def test_no_square_array_is_in_the_memory_of_the_device(monkeypatch, form, platform):
    """Red if the inner products of all pairs leave a kernel."""
    monkeypatch.setenv(gram.SWITCH, form)
    uses = 2048
    shapes = [x.update(shape=(1, uses, 8)) for x in SHAPES]
    exported = jax.export.export(jax.jit(lambda *args: gram_sums(*args)), platforms=(platform,))(*shapes)
    sizes = re.findall(r"tensor<((?:\d+x)+)[fbi]", exported.mlir_module())
    assert max(np.prod([int(n) for n in size[:-1].split("x")], dtype=int) for size in sizes) < uses**2 / 4


def test_pallas_is_not_imported_by_those_who_need_no_kernel():
    """Red if importing the norms, or using them on a CPU, imports Pallas: half a second."""
    import subprocess

    code = (
        "import sys, jax, jax.numpy as jnp; from issgd_jax.gradnorm.gram_sums import gram_sums; "
        "jax.config.update('jax_platforms', 'cpu'); jax.jit(gram_sums)(jnp.ones((1, 200, 1)), jnp.ones((1, 200, 1))); "
        "assert 'jax.experimental.pallas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiles_hold_all_rows():
    for length in (1, 16, 17, 255, 1000):
        size = tiles.tile_length(length, 16, 8)
        assert size == length or (size % 8 == 0 and length - size * (length // size) < size)
        assert size <= 16

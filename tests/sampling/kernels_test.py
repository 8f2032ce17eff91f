"""A kernel that differs from plain JAX, or a written tree that differs from a built one, turns these red."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from issgd_jax.kernels import native
from issgd_jax.sampling import store, sum_tree, uniform
from issgd_jax.sampling.double_float import Double
from tests.helpers import soak
from tests.sampling.helpers import needs_kernels

SIZES = st.sampled_from([1, 16, 17, 300, 5000])  # few: each is compiled
WRITTEN = 64
build = jax.jit(sum_tree.build)


@pytest.mark.parametrize("mirrored", [False, True])
@settings(deadline=None, max_examples=200)
@given(st.floats(0.5, 1, width=32), st.floats(0.5, 1, width=32), st.integers(0, 40), st.booleans())
def test_positions_of_a_node_are_all_in_its_halves(mirrored, x, y, octaves, swapped):
    """Red if those beyond the rounded sum fall to a small leaf below the larger half, drawn 65 times too often."""
    left, right = (np.array([v], np.float32) for v in ((y * 2.0**-octaves, x) if swapped else (x, y * 2.0**-octaves)))
    sum_ = left + right
    for position in (Double(0 * sum_, 0 * sum_), Double(sum_, -sum_ * np.float32(2**-45))):
        to_right, inside, half = sum_tree._choose_half(left, right, position, sum_, np.array([mirrored]))
        inside, half = float(inside.high[0]) + float(inside.low[0]), float(half[0])
        assert half == (right if to_right else left)[0]
        assert min(abs(inside), abs(inside - half)) <= 2.0**-44 * float(
            sum_[0]
        )  # the ends of the node are ends of a half


def leaves(num_leaves, kind, seed=0):
    rng = np.random.default_rng(seed)
    v = {
        "lognormal": rng.lognormal(0, 3, num_leaves),
        "some zero": rng.lognormal(0, 1, num_leaves) * (rng.random(num_leaves) < 0.3),
        "one huge": np.where(np.arange(num_leaves) == num_leaves // 2, 1e9, 1e-6),
        "30 orders of magnitude": 10 ** rng.uniform(-15, 15, num_leaves),
        "all zero": np.zeros(num_leaves),
    }[kind]
    return v.astype(np.float32)


KINDS = ("lognormal", "some zero", "one huge", "30 orders of magnitude")


@functools.partial(jax.jit, static_argnames=("equally_spaced", "num_leaves"))
def both_draws(key, sums, count, *, equally_spaced, num_leaves):
    fast = sum_tree.draw(key, sums, num_leaves=num_leaves, batch_size=WRITTEN, count=count if equally_spaced else None)
    plain = sum_tree.plain_draw(
        jax.random.key_data(key),
        sums,
        count,
        num_leaves=num_leaves,
        equally_spaced=equally_spaced,
        impl=jax.random.key_impl(key),
        batch_size=WRITTEN,
    )
    return fast, plain


@needs_kernels
@settings(deadline=None, max_examples=soak(40, 100))
@given(
    num_leaves=SIZES,
    kind=st.sampled_from((*KINDS, "all zero")),
    equally_spaced=st.booleans(),
    count=st.integers(1, WRITTEN),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_draws_what_plain_jax_draws(num_leaves, kind, equally_spaced, count, seed):
    """The same random words, orders and roundings; positions have 53 bits in one and 48 in the other."""
    sums = build(leaves(num_leaves, kind, seed))
    fast, plain = both_draws(
        jax.random.key(seed), sums, jnp.int32(count), equally_spaced=equally_spaced, num_leaves=num_leaves
    )
    np.testing.assert_array_equal(fast[0], plain[0])
    np.testing.assert_array_equal(fast[1], plain[1])


@needs_kernels
def test_under_another_generator_the_draw_is_made_of_its_words():
    key, sums = jax.random.key(3, impl="rbg"), build(leaves(300, "lognormal"))
    for fast, plain in zip(*both_draws(key, sums, jnp.int32(WRITTEN), equally_spaced=True, num_leaves=300)):
        np.testing.assert_array_equal(fast, plain)


@needs_kernels
@settings(deadline=None, max_examples=soak(15, 30))
@given(
    num_examples=st.sampled_from([1, 7, 1437, 2**24 + 1, 2**30]),
    method=st.sampled_from(["systematic", "independent"]),
    batch_size=st.sampled_from([1, 100]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_draws_the_uniform_minibatch_of_plain_jax(num_examples, method, batch_size, seed):
    key = jax.random.key(seed)
    plain = uniform.plain_draw(
        jax.random.key_data(key),
        num_examples=num_examples,
        in_parts=method == "systematic",
        impl=jax.random.key_impl(key),
        batch_size=batch_size,
    )
    np.testing.assert_array_equal(uniform.draw(key, num_examples, batch_size, method), plain)


@functools.partial(jax.jit, static_argnames="num_leaves")
def both_writes(sums, indices, values, keep_zeros, *, num_leaves):
    fast = sum_tree.write(sums, indices, values, num_leaves=num_leaves, keep_zeros=keep_zeros)
    return fast, sum_tree.plain_write(sums, indices, values, keep_zeros, num_leaves=num_leaves)


@settings(deadline=None, max_examples=soak(40, 100))
@given(num_leaves=SIZES, kind=st.sampled_from((*KINDS, "all zero")), keep_zeros=st.booleans(), seed=st.integers(0, 99))
def test_a_written_tree_equals_the_tree_of_the_new_leaves(num_leaves, kind, keep_zeros, seed):
    """By the kernel and by plain JAX, to the last bit; with doubles, and with indices outside."""
    rng = np.random.default_rng(seed)
    old, new = leaves(num_leaves, kind, seed), leaves(num_leaves, "some zero", seed + 1)
    indices = rng.integers(-3, num_leaves + 3, WRITTEN).astype(np.int32)
    inside = indices[(indices >= 0) & (indices < num_leaves)]
    expected = old.copy()
    expected[inside] = np.where(keep_zeros & (old[inside] == 0), 0, new[inside])
    values = np.where((indices >= 0) & (indices < num_leaves), new[np.clip(indices, 0, num_leaves - 1)], np.nan)
    fast, plain = both_writes(build(old), indices, values.astype(np.float32), keep_zeros, num_leaves=num_leaves)
    for sums, num_rejected in (fast, plain):
        np.testing.assert_array_equal(sums, build(expected))
        assert int(num_rejected) == 0


SPECIAL = (0.0, 1e-45, 1e-30, 1.0, 2.5, 1e20, 3.4e38, np.nan, np.inf, -np.inf, -1.0)


@needs_kernels
@settings(deadline=None, max_examples=soak(40, 1000))
@given(
    num_leaves=SIZES,
    values=st.lists(st.sampled_from(SPECIAL), min_size=WRITTEN, max_size=WRITTEN),
    indices=st.lists(st.integers(-3, 5) | st.integers(-(2**31), 2**31 - 1), min_size=WRITTEN, max_size=WRITTEN),
    keep_zeros=st.booleans(),
    equally_spaced=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_misused_the_kernels_do_what_plain_jax_does(num_leaves, values, indices, keep_zeros, equally_spaced, seed):
    """Red if one clips, counts or falls back to uniform draws where the other does not."""
    _, first = np.unique(indices, return_index=True)  # of one index twice, either value may be written
    indices = np.where(np.isin(np.arange(WRITTEN), first), indices, -1).astype(np.int32)
    old = leaves(num_leaves, "all zero" if seed % 2 else "some zero", seed % 5)
    fast, plain = both_writes(build(old), indices, np.float32(values), keep_zeros, num_leaves=num_leaves)
    for x, y in zip(fast, plain):
        np.testing.assert_array_equal(x, y)
    drawn = both_draws(
        jax.random.key(seed), fast[0], jnp.int32(WRITTEN), equally_spaced=equally_spaced, num_leaves=num_leaves
    )
    for x, y in zip(*drawn):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("equally_spaced", [True, False])
def test_from_a_tree_that_is_none_only_leaves_are_drawn(poison, equally_spaced):
    """Red if a descent follows foreign sums out of the tree: by the kernel and by plain JAX."""
    sums = np.array(build(leaves(5000, "lognormal")))
    for place in (3, 5010, len(sums) - 16, len(sums) - 1):
        sums[place] = poison
        drawn = both_draws(jax.random.key(1), sums, jnp.int32(9), equally_spaced=equally_spaced, num_leaves=5000)
        for indices, _ in drawn:
            assert np.min(indices) >= 0 and np.max(indices) < 5000


@needs_kernels
def test_each_kernel_refuses_arrays_of_other_lengths():
    """Red if a kernel trusts its caller: what it then reads, or writes, is the memory of others."""
    f32, tree = jnp.zeros(20, jnp.float32), jnp.zeros(48, jnp.float32)
    s32, one = jnp.zeros(20, jnp.int32), jnp.zeros((), jnp.int32)
    keep, key, four = jnp.zeros((), bool), jnp.zeros(2, jnp.uint32), jnp.zeros(4, jnp.int32)
    twenty, minima, flying = {"num_leaves": np.int64(20)}, jnp.zeros(48, jnp.int32), {"in_flight": np.int64(1281)}
    calls = {
        "read_scores": ((f32, s32[:19], four), (jnp.float32(four), four), {}),
        "write_scores": ((f32, s32, four, f32[:3], one), (f32, s32, one, one), {}),
        "write_tree": ((tree, four, f32[:3], keep), (tree, one), twenty),
        "draw_leaves": ((key, tree[:32], one + 4), (four, jnp.float32(four)), twenty | {"equally_spaced": np.bool_(1)}),
        "draw_uniform": ((key[:1],), (four,), {"num_examples": np.int64(20), "in_parts": np.bool_(1)}),
        "draw_earliest": ((minima[:32], s32, one, key[0]), (four, four), {}),
        "visit": ((minima[:32], s32, four, one), (minima[:32], s32), flying),
        "write_deadlines": ((minima, s32, four, four[:3], one), (minima,), flying | {"arrived": np.bool_(1)}),
    }
    assert {*calls, "convolution_squares"} == {*native.FUNCTIONS}  # that one: tests/gradnorm/windows_test.py
    for function, (args, results, attributes) in calls.items():
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        with pytest.raises(jax.errors.JaxRuntimeError, match="of the sampler needs"):
            jax.ffi.ffi_call(f"issgd_jax_{function}", shapes)(*args, **attributes)


@needs_kernels
@pytest.mark.skipif(soak(True, False), reason="compiles with sanitizers and runs these tests again: make soak")
def test_sanitizers_find_nothing_while_the_kernels_are_fuzzed(tmp_path):
    """Red if a kernel reads outside its arrays, overflows an integer or shifts too far, even if results are right."""
    compiler = tmp_path / "sanitizing"
    compiler.write_text(
        '#!/bin/sh\nLD_PRELOAD= exec g++ "$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover\n'
    )
    compiler.chmod(0o755)
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "CXX": str(compiler),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    names = ("sampling/kernels", "sampling/visits", "sampling/misuse", "gradnorm/windows")
    tests = [f"tests/{name}_test.py" for name in names]
    options = ["-p", "no:cacheprovider", "-k", "not sanitizers and not compiler"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list((tmp_path / "cache").rglob("kernels-*.so"))


@functools.partial(jax.jit, static_argnames="num_examples")
def both_stores(indices, first, second, *, num_examples):
    written = store.ScoreStore.init(num_examples)
    plain = written.score, written.scored_at
    for step, scores in ((5, first), (3, second), (7, second[::-1])):
        written, rejected = written.write(indices, scores, step)
        *plain, count, index = store.plain_write(*plain, indices, scores, step)
    inside = jnp.clip(indices, 0, num_examples - 1)
    return (
        (written.score, written.scored_at, *rejected, *written.at(inside)),
        (*plain, count, index, *store.plain_read(*plain, inside)),
    )


@needs_kernels
@settings(deadline=None, max_examples=soak(25, 50))
@given(
    indices=st.lists(st.integers(-2, 12), min_size=8, max_size=8),
    scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, -1.0, np.nan, np.inf, -np.inf, 1e-38]), min_size=16, max_size=16),
)
def test_the_kernel_keeps_the_scores_that_plain_jax_keeps(indices, scores):
    """Doubles, bad scores, older ones and indices outside."""
    indices, scores = np.asarray(indices, np.int32), np.asarray(scores, np.float32).reshape(2, 8)
    for fast, plain in zip(*both_stores(indices, *scores, num_examples=11)):
        np.testing.assert_array_equal(fast, plain)


@needs_kernels
def test_vmapped_kernels_keep_their_trees_apart():
    """Several seeds in one program: each has a tree and a key of its own."""
    v = np.stack([leaves(300, "lognormal", seed) for seed in range(3)])
    keys, indices = jax.random.split(jax.random.key(0), 3), jnp.arange(5)

    def run(key, v):
        sums, _ = sum_tree.write(build(v), indices, v[:5] * 2, num_leaves=300)
        return sum_tree.draw(key, sums, num_leaves=300, batch_size=8, count=8)

    together = jax.jit(jax.vmap(run))(keys, v)
    for i in range(3):
        for x, y in zip(together, run(keys[i], v[i])):
            np.testing.assert_array_equal(x[i], y)


def test_without_kernels_the_same_is_drawn():
    """A run without a compiler, or on another device, draws the examples that it draws with one."""
    code = (
        "import jax, numpy as np; from issgd_jax import kernels; from issgd_jax.sampling import sum_tree; "
        "sums = sum_tree.build(np.arange(1000, dtype=np.float32)); "
        "print(kernels.available(), *sum_tree.draw(jax.random.key(1), sums, num_leaves=1000, batch_size=9, count=9)[0])"
    )
    on, off = (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for environment in (dict(os.environ), os.environ | {"ISSGD_JAX_KERNELS": "0"})
    )
    assert off[0] == "False" and on[1:] == off[1:] and len(on) == 10


def test_a_missing_compiler_is_a_warning_that_names_the_consequence(tmp_path):
    code = "from issgd_jax import kernels; print(kernels.available())"
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and "plain JAX" in done.stderr and "compiler" in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from issgd_jax import kernels; print(kernels.available())"
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "ISSGD_JAX_KERNELS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and "no room left" in done.stderr

"""The pool against a Python loop: a wrong shard, order, wrap-around or alias turns these red."""

import socket
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.scoring.workers import WorkerPool
from tests import victims
from tests.gradnorm.helpers import loop_norms, model_problem
from tests.scoring.helpers import two_rounds, two_rounds_of_a_process


def make_pool(score_fn, examples, *, workers, chunk_size):
    return WorkerPool(score_fn, examples, devices=jax.devices()[1 : workers + 1], chunk_size=chunk_size)


def sweep(pool, params, num_examples):
    """Runs one sweep and returns the score of every example, NaN where none was given, and how often it was."""
    scores, times = np.full(num_examples, np.nan), np.zeros(num_examples, int)
    for round_ in pool.score_next(params, step=0, num_rounds=pool.rounds_per_sweep):
        indices, values = np.asarray(round_.indices).ravel(), np.asarray(round_.scores).ravel()
        real = indices < num_examples
        assert real.sum() == round_.num_examples
        scores[indices[real]] = values[real]
        times[indices[real]] += 1
    return scores, times


@pytest.mark.parametrize("num_examples", [12, 11, 10])
def test_conv_scores_from_three_devices_equal_a_loop(num_examples):
    # An MLP would hide it: a convolution over a sharded batch under jit is wrong on all shards but the first.
    loss_fn, params, images, labels = model_problem("convnet", num_examples)
    params = jax.device_put(params, jax.devices()[0])
    pool = make_pool(per_example_grad_norms(loss_fn), (images, labels), workers=3, chunk_size=2)
    scores, times = sweep(pool, params, num_examples)
    np.testing.assert_allclose(scores, loop_norms(loss_fn, params, images, labels), rtol=1e-5)
    assert times.min() >= 1


@pytest.mark.parametrize(
    ("workers", "chunk_size", "num_examples"), [(1, 4, 10), (1, 10, 10), (2, 3, 13), (3, 5, 14), (3, 1, 3)]
)
def test_every_example_is_scored_once_a_sweep_and_then_from_the_start(workers, chunk_size, num_examples):
    values = np.arange(num_examples, dtype=np.float32)
    pool = make_pool(lambda p, x: p * x, (values,), workers=workers, chunk_size=chunk_size)
    for scale in (1.0, 2.0, 3.0):
        scores, times = sweep(pool, jax.device_put(jnp.float32(scale), jax.devices()[0]), num_examples)
        np.testing.assert_array_equal(scores, scale * values)
        assert times.min() >= 1


def test_workers_score_the_same_examples_as_one_with_a_larger_chunk():
    values = np.arange(24, dtype=np.float32)
    three = make_pool(lambda p, x: p * x, (values,), workers=3, chunk_size=2)
    one = make_pool(lambda p, x: p * x, (values,), workers=1, chunk_size=6)
    for _ in range(6):
        (a,), (b,) = three.score_next(jnp.float32(1), 0), one.score_next(jnp.float32(1), 0)
        assert set(np.asarray(a.indices).ravel()) == set(np.asarray(b.indices).ravel())


@pytest.mark.parametrize("devices", [slice(0, 1), slice(1, 4)])
def test_parameters_may_be_donated_while_workers_still_score(devices):
    # Without a copy the learner's donation deletes what the workers read.
    images = np.ones((6, 3), np.float32)
    pool = WorkerPool(lambda p, x: x @ p, (images,), devices=jax.devices()[devices], chunk_size=2)
    params = jax.device_put(jnp.ones(3), jax.devices()[0])
    step = jax.jit(lambda p: 2 * p, donate_argnums=0)
    for expected in (3.0, 6.0, 12.0):
        (round_,) = pool.score_next(params, step=0)
        params = step(params)
        np.testing.assert_array_equal(round_.scores, np.full(round_.scores.shape, expected))


@pytest.mark.parametrize("devices", [slice(0, 1), slice(1, 4)])
def test_a_round_copies_nothing_through_the_host(devices):
    """Red if pmap must reshard what the pool passes."""
    pool = WorkerPool(lambda p, x: x @ p, (np.ones((6, 3), np.float32),), devices=jax.devices()[devices], chunk_size=2)
    params = jax.device_put(jnp.ones(3), jax.devices()[0])
    with jax.transfer_guard("disallow"):
        jax.block_until_ready([round_.scores for round_ in pool.score_next(params, step=0, num_rounds=4)])


def test_each_of_two_processes_gets_the_scores_of_all_workers(tmp_path):
    """Red if a process scores another's shard, or gets only its own scores."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    files = [tmp_path / f"{index}.npy" for index in range(2)]
    arguments = [(port, index, file) for index, file in enumerate(files)]
    processes = [victims.server().Process(target=two_rounds_of_a_process, args=x) for x in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    expected = two_rounds(jax.devices())
    for file in files:
        np.testing.assert_array_equal(np.load(file), expected)


@pytest.mark.parametrize("owners", [[0, 0, 1], [0, 1, 0, 1], [1, 1]], ids=["unequal", "mixed", "none here"])
def test_every_process_must_have_as_many_workers(owners):
    """Without the check pmap would leave out devices, or the processes would wait for each other forever."""
    devices = [types.SimpleNamespace(process_index=owner, device_kind="cpu") for owner in owners]
    with pytest.raises(ValueError, match="each process must have as many workers, side by side, got workers of the"):
        WorkerPool(lambda p, x: x, (np.ones(10),), devices=devices, chunk_size=1)


def test_a_shared_device_holds_the_examples_once():
    device = jax.devices()[0]
    images = jax.device_put(jnp.ones((64, 3)), device)
    before = sum(x.nbytes for x in jax.live_arrays() if x.shape[-2:] == (64, 3))
    buffers = {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape[-2:] == (64, 3)}
    pool = WorkerPool(lambda p, x: x @ p, (images,), devices=[device], chunk_size=2)
    pool.score_next(jax.device_put(jnp.ones(3), device), 0)
    now = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape[-2:] == (64, 3)}
    assert now == buffers and before == images.nbytes


@pytest.mark.parametrize("chunk_size", [0, -1, 5])
def test_chunk_size_must_fit_a_shard(chunk_size):
    with pytest.raises(
        ValueError, match=rf"chunk_size must be between 1 and 4 \(10 examples over 3 workers\), got {chunk_size}"
    ):
        make_pool(lambda p, x: x, (np.ones(10),), workers=3, chunk_size=chunk_size)


def test_more_workers_than_examples():
    with pytest.raises(ValueError, match="need an example for each worker, got 2 for 3"):
        make_pool(lambda p, x: x, (np.ones(2),), workers=3, chunk_size=1)


class Rows:
    """Examples that only a list of indices reads; keeps how many were read at once."""

    def __init__(self, x):
        self.x, self.sizes = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        raise AssertionError(f"example {index} was read alone")

    def __getitems__(self, indices):
        self.sizes.append(len(indices))
        return [{"x": self.x[index]} for index in indices]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_source_gives_the_scores_of_its_arrays(workers):
    """Red if a shard of a source is other than that of arrays, or is gathered more than once."""
    x = np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32)
    rows = Rows(x)
    scores = []
    for source, score_fn in (
        ((x,), lambda p, x: p * x.sum(1)),
        (x, lambda p, x: p * x.sum(1)),
        (rows, lambda p, batch: p * batch["x"].sum(1)),
    ):
        pool = make_pool(score_fn, source, workers=workers, chunk_size=2)
        scores.append(sweep(pool, jnp.float32(2), 13)[0])
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])
    assert rows.sizes == [-(-13 // workers)] * workers


def test_collate_pads_the_examples_of_a_shard():
    tokens = [[1], [2, 3], [4, 5, 6], [7], [8, 9]]

    def make(collate):
        devices = jax.devices()[1:3]
        return WorkerPool(lambda p, x: p * x.sum(1), tokens, devices=devices, chunk_size=3, collate=collate)

    def to_three(examples):
        return np.array([row + [0] * (3 - len(row)) for row in examples])

    scores, _ = sweep(make(to_three), jnp.float32(1), 5)
    assert scores.tolist() == [1, 5, 15, 7, 17]
    with pytest.raises(ValueError, match="collate gave shards of different shapes.*: pad all examples to one length"):
        make(lambda examples: to_three(examples)[:, : max(map(len, examples))])

"""Several learner devices against one with the whole minibatch; convolutions, as an MLP would hide a wrong shard."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import issgd_jax
from issgd_jax import InputError, devices
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.proposal import Mixture
from tests.helpers import arrays_of, check_close, check_same, rewind, scores, small, smoke, without_time

NUM_EXAMPLES, BATCH_SIZE = 40, 12


def mesh_of(count):
    return Mesh(np.asarray(jax.devices()[:count]), ("learner",)) if count > 1 else None


def conv_problem():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(NUM_EXAMPLES, 5, 5, 2)), rng.integers(0, 3, NUM_EXAMPLES)
    params = {"kernel": rng.normal(size=(3, 3, 2, 4)), "dense": rng.normal(size=(4, 3))}
    params, images, labels = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (params, images, labels))

    def loss_fn(params, image, label):
        layout = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(image[None], params["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        logits = jnp.max(jax.nn.relu(found[0]), (0, 1)) @ params["dense"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(int))

    return loss_fn, params, (images, labels)


def other_score(params, images, labels):
    return jnp.mean(images, axis=(1, 2, 3)) ** 2 + labels


def few_steps(count, **options):
    """The states and metrics after some steps on so many devices; before the last, the scores of a round enter."""
    loss_fn, params, examples = conv_problem()
    mesh, optimizer = mesh_of(count), optax.sgd(0.1, momentum=0.9)
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE, Mixture(Calibrated()), options.pop("draw", "systematic"))
    placement = NamedSharding(mesh, PartitionSpec()) if mesh else jax.devices()[0]
    step = Learner(loss_fn, optimizer, mesh=mesh, **options).compile()
    state, sampler_state = TrainState.init(params, optimizer), sampler.init(3)
    round_, now = (jnp.arange(20), jnp.linspace(0.1, 9, 20)), jnp.int32(2)
    state, sampler_state, sampler, examples, round_, now = jax.device_put(
        (state, sampler_state, sampler, examples, round_, now), placement
    )
    for i in range(4):
        if i == 3:
            sampler_state = sampler.ingest(sampler_state, *round_, now)
        state, sampler_state, metrics = step(state, sampler_state, sampler, examples)
    return state, sampler_state, metrics


@pytest.mark.parametrize(
    "options",
    [{"moments": True}, {"score_fn": other_score}, {"refresh": False, "skip_nonfinite": True, "draw": "independent"}],
    ids=["norms", "other scores", "no refresh"],
)
def test_a_step_shared_by_devices_is_that_of_one(options):
    """Red if a shard's gradient, norm, importance weight or mean is not that of its examples."""
    alone, shared = few_steps(1, **options), few_steps(3, **options)
    np.testing.assert_array_equal(shared[2].minibatch.indices, alone[2].minibatch.indices)
    for path, x in jax.tree_util.tree_leaves_with_path(shared):
        first, *others = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(others) == 2 and all(np.array_equal(first, other) for other in others), path
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), shared, alone)


def test_sharing_devices_copy_neither_store_nor_table():
    """Both states are donated on every device; red if that is lost on the way into shard_map, O(N) a step."""
    num_examples, optimizer = 573_000, optax.sgd(0.1)
    sampler = Sampler(num_examples, 128, Mixture(Calibrated()), rebuild_every=0)
    placement = NamedSharding(mesh_of(2), PartitionSpec())
    states = TrainState.init({"w": jnp.zeros(3)}, optimizer), sampler.init(0)
    examples = jnp.ones((num_examples, 3)), jnp.ones(num_examples)
    states, sampler, examples = jax.device_put((states, sampler, examples), placement)
    step = Learner(lambda params, x, y: (params["w"] @ x - y) ** 2, optimizer, mesh=mesh_of(2)).compile()
    memory = step.lower(*states, sampler, examples).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_examples
    step(*states, sampler, examples)
    state, sampler_state = states
    assert state.params["w"].is_deleted()
    assert sampler_state.store.score.is_deleted() and sampler_state.table.sums.is_deleted()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"proposal__when": "auto", "proposal__cost": 1e9},
        {"proposal__name": "uniform", "learner__draw": "shuffled"},
    ],
    ids=["calibrated", "auto", "epochs"],
)
def test_a_run_of_two_learners_is_that_of_one_with_twice_the_batch(overrides, tmp_path):
    """Red if workers, rounds, measurements or the payoff know only a part of the minibatch or of the learners."""
    overrides = {"devices__workers": 2} | overrides
    two = smoke(devices__learners=2, learner__batch_size=16, **overrides)
    two, one = (
        issgd_jax.train(config, tmp_path / f"{config.devices.learners}") for config in (two, smoke(**overrides))
    )
    check_close(two, one)
    assert two[-1]["learner_examples"] == two[-1]["step"] * 32
    record = json.loads((tmp_path / "2" / "config.json").read_text())
    assert record["devices"]["learner"] == ["cpu"] * 2


def test_where_all_devices_are_learners_they_are_the_workers_too(tmp_path):
    assert devices.assign_roles(4).workers == devices.assign_roles(4).learners
    assert devices.assign_roles(3, None, 4).workers == tuple(jax.devices()[3:])
    all_four = smoke(devices__learners=4, devices__workers=4, learner__batch_size=8, workers__chunk_size=75)
    one = smoke(devices__workers=1, devices__host_platform_count=1, workers__chunk_size=300)
    all_four, one = issgd_jax.train(all_four, tmp_path / "4"), issgd_jax.train(one, tmp_path / "1")
    check_close(all_four, one)
    np.testing.assert_allclose(scores(tmp_path / "4")[0], scores(tmp_path / "1")[0], rtol=2e-3, atol=1e-6)


def test_two_learners_go_on_bit_by_bit_and_another_number_is_refused(tmp_path):
    """Red if a checkpoint of one device's copy does not make all copies again."""
    two = {"devices__learners": 2, "devices__workers": 2, "learner__batch_size": 16, "schedule__score_delay": 9}
    config = small(steps=24, **two)
    whole = issgd_jax.train(config, tmp_path)
    last = arrays_of(tmp_path, 24)
    rewind(tmp_path, 14)
    assert without_time(issgd_jax.train(config, tmp_path)) == without_time(whole)
    check_same(tmp_path, 24, last)
    with pytest.raises(InputError, match="devices.learners was 2, now 1"):
        issgd_jax.train(small(steps=24, **two | {"devices__learners": 1}), tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_what_workers_computed_reaches_the_learners_without_the_host(count):
    """Red if shards come in another order, or `device_put` takes the way through the host, as from JAX 0.12 on."""
    sharded = jax.pmap(jnp.sin, devices=jax.devices()[4 - count :])(
        np.arange(30.0, dtype=np.float32).reshape(count, -1)
    )
    jax.block_until_ready(sharded)
    for placement in (jax.devices()[0], NamedSharding(mesh_of(2), PartitionSpec())):
        with jax.transfer_guard("disallow"):
            whole = jax.block_until_ready(devices.put({"scores": sharded}, placement)["scores"])
        np.testing.assert_array_equal(whole, np.asarray(sharded))
        assert whole.is_fully_replicated and whole.devices() <= set(jax.devices()[:2])

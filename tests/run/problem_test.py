"""The trainer on problems of a user's own: examples of any form, keys, optimisers; and what it refuses."""

import json
import pathlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import issgd_jax
from issgd_jax.errors import InputError
from issgd_jax.run import loop, wiring
from issgd_jax.run.metrics import read_metrics
from tests.helpers import small, soak, without_time

NUM_EXAMPLES = 96
RNG = np.random.default_rng(0)
X = RNG.normal(size=(NUM_EXAMPLES, 5)).astype(np.float32)
Y = (X @ np.arange(5) + RNG.standard_t(2, NUM_EXAMPLES)).astype(np.float32)


def config(**changes):
    sizes = {"steps": 30, "eval_every": 10, "workers__chunk_size": 8, "learner__batch_size": 8}
    return small(**(sizes | {"learner__learning_rate": 0.02} | changes))


def squared_error(params, x, y):
    return (x @ params["w"] + params["b"] - y) ** 2


def linear(key):
    return {"w": 0.1 * jax.random.normal(key, (5,)), "b": jnp.float32(0)}


def regression(**changes):
    return issgd_jax.Problem(**({"init": linear, "loss_fn": squared_error, "train": (X, Y)} | changes))


def dropout_loss(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return squared_error(params, jnp.where(keep, 2 * batch["x"], 0), batch["y"])


def dict_loss(params, batch):
    return squared_error(params, batch["x"], batch["y"])


def keyed(**changes):
    data = {"x": X, "y": Y}
    return regression(**({"loss_fn": dropout_loss, "train": data, "test": data, "keyed": True} | changes))


def token_loss(params, tokens, mask, sample_weight):
    logits = params["embedding"][tokens[:-1]] @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    return sample_weight * jnp.sum(losses * mask[1:]) / jnp.maximum(jnp.sum(mask[1:]), 1)


def language(lengths):
    def pad(examples):
        tokens = np.zeros((len(examples), 12), np.int16)
        for row, example in zip(tokens, examples):
            row[: len(example)] = example
        mask = np.arange(12) < np.array([len(example) for example in examples])[:, None]
        return tokens, mask, np.linspace(0.5, 2, len(examples), dtype=np.float32)

    return issgd_jax.Problem(
        init=lambda key: {"embedding": jax.random.normal(key, (7, 4)), "out": jnp.zeros((4, 7))},
        loss_fn=token_loss,
        train=[(start + np.arange(length)) % 6 + 1 for start, length in enumerate(lengths)],
        collate=pad,
        optimizer=optax.adam(0.05),
    )


PROBLEMS = {
    "regression without test data": regression(),
    "dicts with keys": keyed(metrics={"loss": dict_loss, "size": lambda params, batch: jnp.abs(batch["y"])}),
    "token sequences with masks and sample weights": language(RNG.integers(3, 12, 64)),
    "half precision, one array": regression(
        train=X.astype(np.float16), loss_fn=lambda params, x: squared_error(params, x.astype(jnp.float32), x[0])
    ),
}


# What each kind of draw makes small: the noise of ten minibatches, or of each.
@pytest.mark.parametrize(("draw", "noise"), [(None, "variance/window"), ("systematic", "variance/actual")])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_any_problem_trains_by_importance(problem, draw, noise, tmp_path):
    """Red if a form of example, an optimiser or a metric is lost on its way to learner, workers or monitor."""
    rows = issgd_jax.train(config(learner__draw=draw), tmp_path, problem=problem)
    assert rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"]
    assert rows[-1]["scores/scored_fraction"] == 1 and rows[-1][noise] < rows[-1]["variance/uniform"]
    assert rows[-1]["worker_examples"] > 0 and rows[-1]["scores/rejected"] == 0
    assert {name for name in rows[0] if name.startswith("test/")} == (
        {"test/loss", "test/size"} if problem.test is not None else set()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"learner__asynchronous": 3, "devices__workers": 1},
        {"devices__learners": 2, "devices__workers": 2},
        {"workers__score": "loss"},
        *soak(
            [],
            [
                {"schedule__name": "exact", "steps": 4, "eval_every": 4},
                {"proposal__name": "uniform"},
                {"proposal__when": "auto"},
            ],
        ),
    ],
    ids=str,
)
def test_every_part_of_the_trainer_takes_keys(changes, tmp_path):
    """Red if a learner, a schedule or a score calls a keyed loss without its key."""
    rows = issgd_jax.train(config(learner__learning_rate=0.002, **changes), tmp_path, problem=keyed())
    assert np.isfinite(rows[-1]["train/loss"]) and rows[-1]["train/loss"] < rows[0]["train/loss"] * 1.2


def test_learners_that_share_a_minibatch_use_the_keys_of_one(tmp_path):
    """Red if a second learner repeats the keys of the first, or all take others."""
    runs = [
        issgd_jax.train(
            config(devices__learners=n, devices__workers=2, learner__batch_size=8 // n),
            tmp_path / str(n),
            problem=keyed(),
        )
        for n in (1, 2)
    ]
    for row, other in zip(*runs):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


def test_keys_differ_between_examples_steps_and_seeds():
    """Red if a mask is drawn once: the losses of one example at one set of parameters must vary."""
    seen = []

    def loss_fn(params, x, key):
        return jnp.sum(params * 0) + jax.random.uniform(key)

    problem = issgd_jax.Problem(init=lambda key: jnp.zeros(3), loss_fn=loss_fn, train=X, keyed=True)
    for seed in (0, 1):
        parts = wiring.make_parts(config(seed=seed, workers__enabled=False), problem)
        state = loop.start(parts)
        train, sampler = state.train_state, state.sampler_state
        for _ in range(3):
            train, sampler, metrics = parts.train_step(train, sampler, parts.sampler, parts.train_examples)
            seen.extend(np.asarray(metrics.minibatch.losses).tolist())
    assert len(set(seen)) == len(seen) == 2 * 3 * 8


def test_a_run_of_a_problem_goes_on_bit_for_bit(tmp_path):
    """Red if keys, optimiser or data of a resumed run are others."""
    whole = issgd_jax.train(config(), tmp_path / "whole", problem=keyed())
    issgd_jax.train(config(steps=20), tmp_path / "parts", problem=keyed())
    resumed = issgd_jax.train(config(), tmp_path / "parts", problem=keyed())
    assert without_time(resumed) == without_time(whole)


def test_another_problem_is_refused_by_name(tmp_path):
    """Red if the folder of one problem continues with another."""
    issgd_jax.train(config(steps=10), tmp_path, problem=regression())
    for other in (keyed(), regression(name="other"), None):
        with pytest.raises(InputError, match=r"problem was 'tests.run.problem_test.squared_error', now"):
            issgd_jax.train(config(steps=20), tmp_path, problem=other)
    assert len(issgd_jax.train(config(steps=20), tmp_path, problem=regression())) == 3


MODULE = """
    import numpy as np
    import issgd_jax

    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)

    def make_problem():
        return issgd_jax.Problem(
            init=lambda key: np.zeros(5, np.float32),
            loss_fn=lambda params, x, y: (x @ params - y) ** 2,
            train=(x, x @ np.arange(5, dtype=np.float32)),
        )

    def make_nothing():
        pass

    number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""
    (tmp_path / "my_problem.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("my_problem", None)


def test_a_problem_is_named_by_module_and_function(module):
    rows = issgd_jax.train(config(problem="my_problem:make_problem"), module / "run")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert json.loads((module / "run" / "config.json").read_text())["config"]["problem"] == "my_problem:make_problem"
    assert issgd_jax.train(config(problem="my_problem:make_problem"), module / "run") == rows


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("my_problem", "problem must be module:function, got 'my_problem'"),
        ("my_problm:make_problem", "no module 'my_problm': run in the folder that has it"),
        ("my_problem:make", "my_problem has no function 'make'"),
        ("my_problem:number", "my_problem has no function 'number'"),
        ("my_problem:make_nothing", "it returns a NoneType, not an issgd_jax.Problem"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(reference, message, module):
    with pytest.raises(InputError, match=message):
        issgd_jax.train(config(problem=reference), module / "run")
    assert not (module / "run").exists()


def fails(params, x, y):
    raise KeyError("w2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (X, Y[:-1])}, "train data of the problem: all arrays must have as many rows"),
        ({"train": (X[:0], Y[:0])}, "train data of the problem: source has no examples"),
        ({"train": iter([1, 2])}, "train data of the problem: source must have __len__"),
        ({"train": (X[:1], Y[:1]), "test": (X, Y)}, "learner.batch_size is 8|there is 1 training example"),
        ({"test": X}, "the loss of a test example fails"),
        ({"loss_fn": fails}, "the loss of a train example fails: KeyError: 'w2'. loss_fn was called with ONE example"),
        ({"loss_fn": lambda p, x, y: x * p["w"]}, r"got shape \(5,\) .*wrap it: issgd_jax.per_example"),
        ({"loss_fn": lambda p, x, y: jnp.int32(1)}, "must return one floating-point scalar"),
        ({"loss_fn": dropout_loss, "keyed": False}, "the loss of a train example fails: TypeError"),
        ({"init": lambda key: {"w": jnp.zeros(5, jnp.int32), "b": 0.0}}, "gradients need floating point"),
        ({"init": lambda: 1}, "init fails: TypeError"),
        ({"metrics": {"wide": lambda p, x, y: x}}, "metric 'wide' must return one number for one example"),
        ({"metrics": {"bad": fails}}, "metric 'bad' of a train example fails: KeyError"),
    ],
)
def test_a_problem_that_cannot_work_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        issgd_jax.train(config(), tmp_path / "run", problem=regression(**changes))
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_go_with_a_problem_are_refused(tmp_path):
    for message, changes in (
        ("give it as --config.problem=module:function", {"cluster__address": "local"}),
        ("give one of them", {"problem": "my_problem:make_problem"}),
        ("the problem has no logits_fn", {"workers__score": "last_layer"}),
    ):
        with pytest.raises(InputError, match=message):
            issgd_jax.train(config(**changes), tmp_path / "run", problem=regression())


def test_scores_of_the_last_layer_need_the_logits_alone(tmp_path):
    """Red if a keyed problem passes its keys on to the logits."""

    def loss_fn(params, x, label, key):
        noisy = x + 0.1 * jax.random.normal(key, x.shape)
        return optax.softmax_cross_entropy_with_integer_labels(noisy @ params, label)

    problem = issgd_jax.Problem(
        init=lambda key: jnp.zeros((5, 3)), loss_fn=loss_fn, logits_fn=lambda params, x: x @ params,
        train=(X, RNG.integers(0, 3, NUM_EXAMPLES).astype(np.int64)), keyed=True,
    )  # fmt: skip
    rows = issgd_jax.train(config(workers__score="last_layer"), tmp_path, problem=problem)
    assert rows[-1]["scores/scored_fraction"] == 1


def test_the_best_checkpoint_is_of_the_least_test_loss_where_there_is_no_error(tmp_path):
    problem = regression(test=(X, Y))
    issgd_jax.train(config(checkpoint__every_steps=1000), tmp_path, problem=problem)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    states = [json.loads(path.read_text()) for path in pathlib.Path(tmp_path).glob("checkpoints/*/state.json")]
    assert min(state["test_error"] for state in states) == min(row["test/loss"] for row in rows[1:])


def test_the_first_strides_are_in_the_unit_of_the_norms(tmp_path):
    """Red if the trainer waits for a window: until a rebuild, small norms look like examples that need no visit."""

    def tiny_error(params, x, y):
        return 1e-4 * squared_error(params, x, y)

    changes = {"learner__draw": "stride", "workers__enabled": False, "steps": 4, "eval_every": 4}
    row = issgd_jax.train(config(**changes), tmp_path, problem=regression(loss_fn=tiny_error))[-1]
    assert row["scores/effective_sample_size"] > 7

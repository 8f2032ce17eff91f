"""Whole runs on real digits: schedules, reproducibility, devices, bad numbers and bad input."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issgd_jax
from issgd_jax import BadScoreError, NonFiniteLossError
from issgd_jax.config import columns
from issgd_jax.run import histograms, metrics
from issgd_jax.scoring import scores as scores_lib
from tests.helpers import arrays_of, check_close, read_events, scores, smoke, soak, without_time

REQUIRED, SCORES = set(columns.ALWAYS), set(columns.WITH_IMPORTANCE_SAMPLING)


@pytest.mark.parametrize("schedule", ["exact", "relaxed", "free_running"])
@pytest.mark.parametrize("proposal", ["proportional", "mixture", "calibrated"])
def test_every_schedule_with_every_proposal(schedule, proposal, tmp_path):
    config = smoke(schedule__name=schedule, proposal__name=proposal, steps=12, eval_every=6)
    history = issgd_jax.train(config, tmp_path)
    assert [row["step"] for row in history] == [0, 6, 12]
    assert all(row.keys() == REQUIRED | SCORES for row in history)
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    assert history[-1]["learner_examples"] == 12 * 32
    if schedule == "exact":
        assert history[-1]["worker_examples"] == 12 * 1200
        assert history[-1]["scores/scored_fraction"] == 1
        assert history[1]["scores/staleness_max"] == 0 and history[-1]["scores/staleness_max"] == 1
    if schedule == "relaxed":  # rounds of 300 at steps 0, 4, 8; each enters 4 steps later
        assert history[-1]["worker_examples"] == 2 * 300
        assert history[-1]["scores/staleness_max"] == 12


def test_the_exact_schedule_draws_from_the_ideal_proposal_at_every_step(tmp_path):
    """Red if the monitor pairs the parameters of one step with the probabilities of another."""
    config = smoke(schedule__name="exact", steps=6, eval_every=1, proposal__uniform_fraction=0.0)
    config.monitor.examples = 1200
    *history, last = issgd_jax.train(config, tmp_path)
    for row in history:
        np.testing.assert_allclose(row["variance/actual"], row["variance/ideal"], rtol=1e-3)
        assert row["variance/ideal"] < row["variance/uniform"]
        assert row["scores/staleness_max"] == 0 and row["scores/scored_fraction"] == 1
    assert last["scores/staleness_max"] == 1  # after the last step nothing is scored any more


def test_leaving_old_scores_out_is_measured_too(tmp_path):
    history = issgd_jax.train(smoke(proposal__name="proportional", proposal__max_staleness=8), tmp_path)
    assert all(row["variance/actual"] > 0 and np.isfinite(row["variance/gain"]) for row in history)
    assert history[-1]["variance/gain"] > 0


def test_uniform_has_no_workers_and_no_scores(tmp_path):
    history = issgd_jax.train(smoke(proposal__name="uniform"), tmp_path)
    assert all(row.keys() == REQUIRED for row in history)
    assert all(row["worker_examples"] == 0 and row["variance/gain"] == 1 for row in history)
    assert all(row["variance/actual"] == row["variance/uniform"] for row in history)
    assert not (tmp_path / "scores.npz").exists()


def test_off_is_uniform(tmp_path):
    off, uniform = (
        without_time(issgd_jax.train(smoke(**which), tmp_path / name))
        for name, which in (("off", {"proposal__when": "off"}), ("uniform", {"proposal__name": "uniform"}))
    )
    assert off == uniform


@pytest.mark.parametrize("workers", [True, False])
def test_auto_stays_while_it_pays_and_leaves_and_returns_where_it_does_not(workers, tmp_path):
    """With a given cost, the run without auto where that pays: bit by bit in `make soak`; as `make test` compiles, the
    two programs round differently, so that only the first rows can be compared."""
    choices = {"steps": 160, "eval_every": 4, "workers__enabled": workers, "monitor__examples": 64}
    choices |= {"model__mlp__hidden_sizes": (16,), "data__test_split": "test[:50]", "learner__draw": "systematic"}
    always = without_time(issgd_jax.train(smoke(**choices), tmp_path / "on"))
    choices["proposal__when"] = "auto"
    paying = without_time(issgd_jax.train(smoke(proposal__cost=0.0, **choices), tmp_path / "paying"))
    assert all(row["payoff/active"] == 1 for row in paying)
    paying = [{k: v for k, v in row.items() if not k.startswith("payoff/")} for row in paying]
    check_close(paying[:4], always[:4])
    if soak(False, True):
        assert paying == always
    dear = [issgd_jax.train(smoke(proposal__cost=1e9, **choices), tmp_path / name) for name in "ab"]
    assert without_time(dear[0]) == without_time(dear[1])
    active = np.array([row["payoff/active"] for row in dear[0][:-1]])
    assert active[0] == 1 and {(1, 0), (0, 1)} <= set(itertools.pairwise(active))
    # While idle, what is measured are the uniform draws made, not those that the proposal would have made.
    assert all((row["variance/gain"] == 1) == (row["payoff/active"] == 0) for row in dear[0][1:])
    scored = np.array([row["worker_examples"] for row in dear[0]])
    idle = (active == 0) & np.r_[False, (active == 0)[:-1]]  # one round may still be on its way
    assert np.all(np.diff(scored)[idle] == 0) and (scored[-1] > 0) == workers


def test_auto_measures_its_cost(tmp_path):
    history = issgd_jax.train(smoke(steps=80, eval_every=40, proposal__when="auto"), tmp_path)
    assert history[0]["payoff/cost"] is None and history[0]["payoff/active"] == 0
    assert history[-1]["payoff/cost"] > 0 and history[-1]["worker_examples"] > 0


def test_importance_sampling_lowers_the_variance(tmp_path):
    history = issgd_jax.train(smoke(steps=120, eval_every=20), tmp_path)
    assert all(row["variance/ideal"] <= row["variance/actual"] * 1.05 for row in history)
    assert history[-1]["variance/gain"] > 1.2


@pytest.mark.parametrize("proposal", ["proportional", "calibrated", "uniform"])
def test_same_seed_and_delay_are_bit_equal(proposal, tmp_path):
    config = smoke(proposal__name=proposal)
    a, b = (without_time(issgd_jax.train(config, tmp_path / name)) for name in "ab")
    assert a == b
    if proposal != "uniform":
        for x, y in zip(scores(tmp_path / "a"), scores(tmp_path / "b"), strict=True):
            np.testing.assert_array_equal(x, y)
    other = without_time(issgd_jax.train(smoke(proposal__name=proposal, seed=1), tmp_path / "c"))
    assert other != a


def test_four_devices_and_one_agree_to_rounding(tmp_path):
    four = issgd_jax.train(smoke(), tmp_path / "four")
    one = smoke(devices__workers=1, devices__host_platform_count=1, workers__chunk_size=300)
    one = issgd_jax.train(one, tmp_path / "one")
    for a, b in zip(without_time(four), without_time(one), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(scores(tmp_path / "four")[0], scores(tmp_path / "one")[0], rtol=2e-3, atol=1e-6)


SMALL_MODELS = {
    "convnet": {"channels": (4, 8), "dense_size": 16},
    "gru": {"units": 16},
    "transformer": {"num_layers": 1, "width": 16, "num_heads": 2},
}


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_every_model_trains(model, tmp_path):
    config = smoke(model__name=model, steps=8, eval_every=8, learner__optimizer="adam", learner__learning_rate=0.01)
    config.model[model].update(SMALL_MODELS[model])
    config.data.train_split, config.data.test_split, config.workers.chunk_size = "train[:300]", "test[:50]", 50
    history = issgd_jax.train(config, tmp_path)
    assert history[-1]["train/loss"] < history[0]["train/loss"]


@pytest.mark.parametrize(
    ("optimizer", "lr_schedule"),
    [("sgd", "cosine"), ("sgd", "linear"), ("adamw", "linear"), ("rmsprop", "cosine"), ("lion", "constant")],
)
def test_optimizers_and_schedules_of_optax(optimizer, lr_schedule, tmp_path):
    config = smoke(steps=3, eval_every=3, proposal__name="uniform")
    config.learner.optimizer, config.learner.lr_schedule, config.learner.learning_rate = optimizer, lr_schedule, 0.001
    assert np.isfinite(issgd_jax.train(config, tmp_path)[-1]["train/loss"])


def test_bad_scores_are_counted_and_never_enter(tmp_path, monkeypatch):
    real = scores_lib.GradientNorm
    calls = []

    def sometimes_bad(loss_fn, microbatch_size):
        norms_fn = real(loss_fn, microbatch_size)
        calls.append(loss_fn)
        if len(calls) > 1:  # the monitor's own
            return norms_fn
        bad = jnp.array([jnp.nan, jnp.inf, 1.0, 1.0])
        return lambda params, *batch: norms_fn(params, *batch) * bad[jnp.arange(batch[1].shape[0]) % 4]

    monkeypatch.setattr(scores_lib, "GradientNorm", sometimes_bad)
    history = issgd_jax.train(smoke(), tmp_path)
    assert len(calls) == 2
    score, scored_at = scores(tmp_path)
    assert np.all(np.isfinite(score)) and history[-1]["scores/rejected"] == 9 * 150
    assert 0 < np.mean(scored_at >= 0) < 1
    for name, values in ((histograms.SCORES, score), (histograms.STALENESS, history[-1]["step"] - scored_at)):
        counts, _ = np.histogram(values[scored_at >= 0], histograms.EDGES[name])
        assert history[-1][name] == counts.tolist()
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    calls.clear()
    with pytest.raises(BadScoreError, match=r"score\(s\) were NaN, infinite or negative up to step 20, .* example \d+"):
        issgd_jax.train(smoke(workers__strict=True), tmp_path, overwrite=True)


def test_workers_score_in_bfloat16_and_the_learner_trains_in_float32(tmp_path):
    """Red if the precision does not reach the workers, or reaches more than them."""
    few = {"steps": 20, "eval_every": 20, "learner__refresh": False, "schedule__steps_per_round": 1000}
    exact, half = (tmp_path / name for name in ("float32", "bfloat16"))
    for workdir in (exact, half):
        history = issgd_jax.train(smoke(workers__precision=workdir.name, **few), workdir)
        assert history[-1]["train/loss"] < history[0]["train/loss"] and history[-1]["worker_examples"] == 300
    (scores_exact, scored_at), (scores_half, _) = scores(exact), scores(half)
    np.testing.assert_allclose(scores_half[scored_at == 0], scores_exact[scored_at == 0], rtol=0.1)
    assert np.mean(scores_half[scored_at == 0] != scores_exact[scored_at == 0]) > 0.9
    assert {str(x.dtype) for name, x in arrays_of(half, 20).items() if "params" in name} == {"float32"}


def test_the_learner_scores_what_it_trains_on(tmp_path):
    # One round in all, of a quarter of the examples: every other score is the learner's own.
    few = {"steps": 20, "eval_every": 20, "schedule__steps_per_round": 1000}
    for refresh in (True, False):
        workdir = tmp_path / str(refresh)
        history = issgd_jax.train(smoke(learner__refresh=refresh, **few), workdir)
        _, scored_at = scores(workdir)
        assert (np.max(scored_at) == 19) == refresh and np.sum(scored_at == 0) > 0
        assert history[-1]["scores/rejected"] == 0


def test_the_equivalent_batch_is_the_gain_in_examples(tmp_path):
    row = issgd_jax.train(smoke(), tmp_path)[-1]
    np.testing.assert_allclose(row["variance/equivalent_batch"], 32 * row["variance/gain"], rtol=1e-6)


def test_without_workers_the_learner_alone_gives_scores(tmp_path):
    config = smoke(workers__enabled=False, steps=100, eval_every=20, monitor__examples=1200)
    history = issgd_jax.train(config, tmp_path)
    assert all(row["worker_examples"] == 0 for row in history)
    fractions = [row["scores/scored_fraction"] for row in history]
    assert fractions[0] == 0 and fractions == sorted(fractions) and fractions[-1] > 0.5
    assert history[-1]["variance/gain"] > 1.2
    np.testing.assert_allclose(np.mean(scores(tmp_path)[1] >= 0), fractions[-1], rtol=1e-6)


def test_scores_age_while_no_round_enters(tmp_path):
    """Red if a proposal that waits for its workers draws by what it knew when it last heard of them."""
    few = {"steps": 70, "eval_every": 20, "schedule__score_delay": 60}
    waiting = issgd_jax.train(smoke(**few), tmp_path / "waiting")
    alone = issgd_jax.train(smoke(**few, workers__enabled=False), tmp_path / "alone")
    assert without_time(waiting)[:3] == without_time(alone)[:3]
    assert waiting[-1]["worker_examples"] > 0


@pytest.mark.parametrize("score", ["last_layer", "loss"])
def test_other_scores_lower_the_variance_too(score, tmp_path):
    history = issgd_jax.train(smoke(workers__score=score, steps=60, eval_every=60), tmp_path)
    found, scored_at = scores(tmp_path)
    assert history[-1]["variance/gain"] > 1.05 and np.all(scored_at >= 0)
    assert score == "loss" or np.max(found) <= np.sqrt(2)


@pytest.mark.parametrize(
    "overrides",
    [
        {"learner__draw": "independent"},
        {"learner__draw": "without_replacement"},
        {"learner__draw": "stride"},
        {
            "learner__draw": "stride",
            "learner__limit": 2.0,
            "schedule__name": "free_running",
            "devices__learners": 2,
            "devices__workers": 1,
        },
        {"learner__draw": "stride", "schedule__name": "exact", "learner__refresh": False},
        {
            "learner__draw": "stride",
            "learner__limit": 2.0,
            "schedule__name": "free_running",
            "learner__asynchronous": 2,
            "devices__workers": 2,
        },
    ],
)
def test_every_draw_trains(overrides, tmp_path):
    """Red if a kind of draw does not go with a schedule, or with learners that share or take turns."""
    history = issgd_jax.train(smoke(**overrides), tmp_path)
    assert history[-1]["train/loss"] < history[0]["train/loss"]


def test_explain_is_printed_before_training(tmp_path, capsys):
    issgd_jax.train(smoke(steps=5, eval_every=5, log__explain=True), tmp_path)
    assert re.search(r"\['Dense_0'\]\['kernel'\] +64×32 +outer", capsys.readouterr().out)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_metrics(tmp_path):
    config = smoke(learner__learning_rate=1e30, proposal__name="uniform", steps=30, eval_every=30)
    with pytest.raises(
        NonFiniteLossError,
        match=r"minibatch loss or gradient is not finite at step \d+; last good metrics: step 0, ",
    ):
        issgd_jax.train(config, tmp_path)
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0] and np.isfinite(rows[0]["train/loss"])


def test_what_a_run_leaves_behind(tmp_path):
    written = []
    config, writer = smoke(log__tensorboard=True), lambda step, row: written.append({"step": step} | row)
    history = issgd_jax.train(config, tmp_path, writers=[writer])
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == history
    assert written == history
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["learner"]["batch_size"] == 32
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["issgd-jax"]
    assert record["devices"] == {"learner": ["cpu"], "workers": ["cpu"] * 3}
    assert record["git_commit"] is None or len(record["git_commit"].removesuffix("-dirty")) == 40
    events = list(tmp_path.glob("events.out.tfevents.*"))
    assert len(events) == 1
    steps, values = zip(*read_events(events[0])["train/loss"], strict=True)
    assert steps == tuple(row["step"] for row in history)
    assert values == pytest.approx([row["train/loss"] for row in history])

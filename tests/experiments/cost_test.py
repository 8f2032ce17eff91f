"""Costs of a step: which arms are measured, what is kept beside what, and what asynchronous learners are charged."""

from experiments.paper import cost, results
from tests.experiments.helpers import SMALL


def test_costs_cover_arms_and_their_baselines(tmp_path, monkeypatch):
    """Red if costs measured alike are not kept beside new ones, or others are mixed with them."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    measured = cost.measure("fair", "digits", arms=["calibrated"], overrides=SMALL, num_blocks=1)
    assert measured["ratio"].keys() == {"uniform", "calibrated"}
    assert measured["ratio"]["uniform"] == 1 and measured["ratio"]["calibrated"] > 0
    assert measured["measured"].keys() == measured["ratio"].keys()
    cost.save(measured)
    cost.save(measured | {"ratio": {"uniform": 1.0, "exact": 9.0}, "milliseconds": {}})
    assert cost.load("fair", "digits") == measured["ratio"] | {"exact": 9.0}
    cost.save(measured | {"network": "another"})
    assert cost.load("fair", "digits") == measured["ratio"]


def test_learners_that_share_a_gradient_share_its_time_alone():
    """The owner's part is not divided: a charge for k learners is never less than that."""
    assert cost.charged(5.0, 1.0, 1) == 5 and cost.charged(5.0, 1.0, 4) == 2
    measured = cost.measure("asgd", "digits", arms=["calibrated_8"], overrides=SMALL, num_blocks=1)
    assert measured["ratio"].keys() == {"uniform_1", "calibrated_8"}
    assert measured["milliseconds"]["calibrated_8"] > 0

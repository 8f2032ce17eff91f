"""Studies: every arm is a valid experiment, and pairs of arms differ in what they are to differ in."""

import pytest

from experiments.paper import replicas, results, studies
from issgd_jax import config as config_lib


# An override that names no field, or a value out of range, would stop a sweep hours after its start.
@pytest.mark.parametrize("study", studies.STUDIES.values(), ids=studies.STUDIES)
def test_every_arm_of_every_study_is_a_valid_experiment(study):
    for data in study.data:
        for name in study.choose_arms(data):
            for rate in study.rates(name, data):
                config = study.config(name, data, learning_rate=rate, seed=1)
                config_lib.validate(config)
                if config.problem is None:  # others are trained one at a time
                    replicas.check(config)


def test_both_arms_of_the_papers_pairs_have_one_rate():
    """The original compared SGD at 0.001 with ISSGD at 0.01."""
    arms = studies.STUDIES["svhn"].arms
    for rate in ("0.01", "0.001"):
        rates = {arm.learning_rates for name, arm in arms.items() if name.split("_")[1] == f"lr{rate}"}
        assert rates == {(float(rate),)}
        assert {f"sgd_lr{rate}", f"issgd_lr{rate}_c1", f"issgd_lr{rate}_c10", f"calibrated_lr{rate}"} <= set(arms)


def test_a_study_of_several_networks_is_not_named_after_one_of_them():
    study = studies.get_study("architectures")
    config = study.config("gru_uniform", "digits", learning_rate=0.1, seed=0)
    assert results.describe_network(study, config.to_dict()) == "4 networks"
    assert config.model.transformer.patch_size == 2  # patches of seven are for larger images

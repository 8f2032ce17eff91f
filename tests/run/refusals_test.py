"""Values that cannot work are refused in words, before anything is compiled or written."""

import numpy as np
import pytest

import issgd_jax
from issgd_jax import InputError
from tests.helpers import smoke


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__name": "digts"}, "unknown data set 'digts': did you mean digits"),
        ({"data__train_split": "trian"}, "split 'trian' of digits cannot be read .there is no 'trian'"),
        (
            {"model__name": "mpl"},
            r"model.name must be one of convnet, gru, mlp, transformer, got 'mpl' .*--config.model.name",
        ),
        (
            {"proposal__name": "calibrate"},
            "proposal.name must be one of uniform, proportional, mixture, calibrated, got 'calibrate'",
        ),
        ({"schedule__name": "free"}, "schedule.name must be one of exact, relaxed, free_running"),
        ({"learner__optimizer": "sdg"}, "no optimiser 'sdg'; did you mean sgd"),
        (
            {"learner__optimizer": "lbfgs"},
            "lbfgs cannot train with a constant rate from gradients|lbfgs has no momentum",
        ),
        ({"learner__optimizer": "adagrad"}, "adagrad has no momentum, got 0.9: set --config.learner.momentum=0"),
        ({"learner__lr_schedule": "step"}, "learner.lr_schedule must be one of"),
        ({"learner__batch_size": 1201}, "learner.batch_size is 1201, but there are 1200 examples to draw from"),
        (
            {"learner__draw": "random_subset", "proposal__name": "uniform", "learner__batch_size": 401},
            "learner.batch_size is 401, but there are 400 examples to draw from",
        ),
        (
            {"learner__draw": "stride", "proposal__when": "auto"},
            "learner.draw is stride and proposal.when auto, which draws uniformly between trials",
        ),
        (
            {"learner__draw": "stride", "proposal__name": "proportional", "proposal__max_staleness": 10},
            "learner.draw is stride, which visits every example, but proposal.max_staleness is 10",
        ),
        (
            {"learner__draw": "stride", "learner__batch_size": 1201},
            "learner.batch_size is 1201, but there are 1200 examples to draw from",
        ),
        (
            {"learner__limit": 5.0, "learner__draw": "systematic"},
            "learner.limit is 5.0, which visits by importance make up for, but learner.draw is sys",
        ),
        ({"learner__limit": 1.9}, r"learner.limit must be >= 2 and <= 1e6, got 1.9 \(see --config.learner.limit\)"),
        (
            {"learner__limit": 5.0, "learner__draw": "stride", "proposal__name": "uniform"},
            "learner.draw is stride, proposal.name uniform and proposal.when on: use",
        ),
        (
            {"learner__limit": 5.0, "learner__draw": "stride", "workers__score": "loss"},
            "learner.limit is 5.0, a limit of gradient norms, but learner.refresh is True and workers.score loss",
        ),
        (
            {"learner__limit": 5.0, "learner__draw": "stride", "learner__refresh": False},
            "learner.limit is 5.0, a limit of gradient norms, but learner.refresh is False",
        ),
        ({"learner__draw": "shuffled"}, "learner.draw is shuffled, which draws uniformly, but proposal.name is"),
        (
            {"workers__chunk_size": 401},
            r"chunk_size must be between 1 and 400 \(1200 examples over 3 workers\), got 401",
        ),
        ({"learner__asynchronous": 0}, "learner.asynchronous must be between 1 and 1,024, got 0"),
        (
            {"learner__asynchronous": 4, "learner__max_gradient_delay": 2},
            "learner.max_gradient_delay must be >= learner.asynchronous - 1 = 3, got 2",
        ),
        (
            {"learner__asynchronous": 2},
            r"devices.workers must be between 1 and 2 with 4 device\(s\), 2 .* learners, got 3: .*count=5",
        ),
        ({"learner__batch_size": 0}, "learner.batch_size must be between 1 and 2,147,483,647, got 0"),
        ({"workers__chunk_size": -1}, "workers.chunk_size must be between 1 and"),
        ({"steps": 0}, "steps must be between 1"),
        ({"eval_every": -5}, "eval_every must be between 1"),
        (
            {"schedule__steps_per_round": 0},
            r"schedule.steps_per_round must be between 1 .*--config.schedule.steps_per_round",
        ),
        ({"schedule__score_delay": -1}, "schedule.score_delay must be between 0"),
        ({"proposal__smoothing": -0.5}, "proposal.smoothing must be >= 0 and .*, got -0.5"),
        ({"proposal__smoothing": float("nan")}, "proposal.smoothing must be >= 0 and .*, got nan"),
        ({"proposal__uniform_fraction": 1.0}, "proposal.uniform_fraction must be >= 0 and <= 0.999"),
        ({"learner__learning_rate": 0.0}, "learner.learning_rate must be > 0"),
        ({"learner__learning_rate": float("inf")}, "learner.learning_rate must be > 0 and .*, got inf"),
        ({"learner__momentum": 1.0}, "learner.momentum must be >= 0 and < 1"),
        ({"devices__workers": 4}, r"devices.workers must be between 1 and 3 with 4 device\(s\), got 4"),
        ({"devices__workers": 0}, "devices.workers must be between 1"),
        ({"devices__learners": 5}, r"devices.learners must be between 1 and 4 with 4 .*, got 5: .*_platform_count=5"),
        ({"devices__learners": 0}, "devices.learners must be between 1 and 2,147,483,647, got 0"),
        ({"devices__learners": 3}, r"devices.workers must be between 1 and 1 with 4 device\(s\), 3 of them learners"),
        (
            {"devices__learners": 2, "devices__workers": 2, "learner__batch_size": 601},
            "learner.batch_size is 601 on each of 2 learners, but there are 1200 examples to draw from",
        ),
        ({"devices__host_platform_count": 9}, "host_platform_count is 9, but JAX has started with 4"),
        ({"devices__host_platform_count": -1}, "devices.host_platform_count must be between 0"),
        ({"monitor__examples": 1}, "monitor.examples must be between 2"),
        ({"model__mlp__hidden_sizes": (8, 0)}, r"model.mlp.hidden_sizes must be sizes >= 1, got \(8, 0\)"),
        (
            {"schedule__score_delay": 40},
            "score_delay is 40, but training ends after 40 steps: no score would ever enter",
        ),
        (
            {"schedule__steps_per_round": 2, "schedule__score_delay": 33},
            r"score_delay must be <= 16 \* steps_per_round",
        ),
        ({"seed": 2**32}, "seed must be between 0 and 4,294,967,295"),
        ({"proposal__max_staleness": 2**40}, "proposal.max_staleness must be between 0"),
        ({"proposal__smoothing": 1e38}, "proposal.smoothing must be .* <= 1e"),
        ({"data__name": ""}, "data.name must be a non-empty string, got ''"),
        ({"data__name": "../x"}, "data set '../x' cannot be found"),
        ({"data__name": "mnist:9.9.9"}, "data set 'mnist:9.9.9' cannot be found"),
        ({"data__train_split": "train[:1]", "learner__batch_size": 1}, "there is 1 training example"),
        ({"model__name": "convnet", "model__convnet__channels": (4,) * 12}, "convnet cannot take images of shape"),
        ({"learner__draw": "madow"}, "learner.draw must be one of systematic, independent, without_replacement"),
        ({"workers__score": "norm"}, "workers.score must be one of gradient_norm, last_layer, loss"),
        ({"workers__precision": "float16"}, "workers.precision must be one of float32, bfloat16, got 'float16'"),
        (
            {"workers__enabled": False, "learner__refresh": False},
            "workers.enabled and learner.refresh are both False: proposal calibrated would never see a score",
        ),
        ({"workers__enabled": False, "schedule__name": "exact"}, "schedule.name is exact.*workers.enabled is False"),
        (
            {"model__mlp__hidden_sizes": (10**6, 10**6)},
            "the model has 1,000,076,000,010 parameters, which need .* bytes, but",
        ),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of stop, skip, got 'ignore'"),
        ({"checkpoint__keep": 0}, "checkpoint.keep must be between 1 and"),
        ({"watchdog_seconds": 0.0}, "watchdog_seconds must be > 0"),
        ({"model__transformer__num_heads": 5}, "width must be a multiple of num_heads, got 64 and 5"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled_or_written(overrides, message, tmp_path, compilations):
    with pytest.raises(InputError, match=message):
        issgd_jax.train(smoke(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not compilations


@pytest.mark.parametrize(
    ("name", "value", "type_name"),
    [
        ("steps", None, "int"), ("steps", True, "int"), ("steps", 2.5, "int"), ("seed", None, "int"),
        ("learner.learning_rate", None, "float"), ("learner.learning_rate", "fast", "float"),
        ("data.name", None, "str"), ("learner.nesterov", 1, "bool"), ("model.mlp.hidden_sizes", 8, "tuple"),
        ("devices.workers", 1.5, "int or None"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type(name, value, type_name, tmp_path):
    config = smoke()
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=f"{name} must be of type {type_name}, got {value!r}"):
        issgd_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_size_that_is_no_whole_number(tmp_path):
    with pytest.raises(InputError, match=r"model.mlp.hidden_sizes must be sizes >= 1, got \(8.5,\)"):
        issgd_jax.train(smoke(model__mlp__hidden_sizes=(8.5,)), tmp_path)


def test_a_field_that_no_config_has():
    config = smoke()
    with config.unlocked():
        config.learner.learning_rat = 0.1
    with pytest.raises(InputError, match=r"no field 'learner.learning_rat': did you mean learner.learning_rate\?"):
        issgd_jax.train(config, "/nonexistent")


def test_a_field_that_is_missing():
    config = smoke()
    del config.proposal.half_life
    with pytest.raises(InputError, match="lacks the field.*proposal.half_life"):
        issgd_jax.train(config, "/nonexistent")


def test_a_workdir_that_cannot_be_written(tmp_path, compilations):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(InputError, match="is no folder"):
            issgd_jax.train(smoke(), workdir)
    assert not compilations


def test_compilations_are_seen(tmp_path, compilations):
    issgd_jax.train(smoke(steps=1, proposal__name="uniform"), tmp_path)
    assert compilations  # else the tests above could not fail


def test_labels_out_of_range():
    with pytest.raises(InputError, match=r"labels must lie in \[0, 3\), got 0 to 3"):
        issgd_jax.Dataset(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4, dtype=np.int32), num_classes=3)

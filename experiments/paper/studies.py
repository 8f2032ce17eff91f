"""The studies and their arms. Imports no jax."""

from experiments.paper.study import Arm, Study
from issgd_jax.config import nearest
from issgd_jax.errors import InputError

_UNIFORM = {"proposal.name": "uniform"}
_REFRESH_ONLY = {"workers.enabled": False}
_STRIDE = {"learner.draw": "stride"}
_LIMITED = _STRIDE | {"learner.limit": 5.0}


def _issgd(smoothing: float) -> dict:
    """Returns the paper's method: additive smoothing, no refresh, draws with replacement."""
    return {
        "proposal.name": "proportional",
        "proposal.smoothing": smoothing,
        "learner.refresh": False,
        "learner.draw": "independent",
    }


def _workers(examples: int, steps: int) -> dict:
    """Returns rounds of `examples` every `steps` steps, whose scores enter `steps` steps later."""
    return {"workers.chunk_size": examples, "schedule.steps_per_round": steps, "schedule.score_delay": steps}


def _paper_pairs() -> dict[str, Arm]:
    """Returns the full 2 x 2: both arms of a pair have the same learning rate; SGD does not depend on the smoothing."""
    arms = {}
    for rate in (0.01, 0.001):
        baseline = f"sgd_lr{rate}"
        arms[baseline] = Arm(f"SGD, rate {rate}", _UNIFORM, (rate,), baseline=baseline)
        for smoothing in (10.0, 1.0):
            label = f"ISSGD, rate {rate}, c = {smoothing:g}"
            arms[f"issgd_lr{rate}_c{smoothing:g}"] = Arm(label, _issgd(smoothing), (rate,), baseline=baseline)
        arms[f"calibrated_lr{rate}"] = Arm(f"calibrated, rate {rate}", {}, (rate,), baseline=baseline)
    return arms


# Every example scored before every step: the least possible variance, at a cost that only small data can bear.
_ORACLE = {
    "proposal.name": "proportional",
    "proposal.smoothing": 0.0,
    "workers.chunk_size": 1437,
    "schedule.steps_per_round": 1,
    "schedule.score_delay": 0,
}


def _with_score(score: str) -> dict:
    """Returns a proposal with v = another score, and a uniform share learned on line."""
    return {"proposal.name": "mixture", "proposal.smoothing": 0.0, "workers.score": score}


_LARGE = ("fashion_mnist", "svhn")  # digits has three workers of its own
_FAIR_ARMS = {
    "uniform": Arm("SGD, i.i.d.", _UNIFORM | {"learner.draw": "independent"}),
    "shuffled": Arm("SGD, shuffled epochs", _UNIFORM | {"learner.draw": "shuffled"}),
    "random_subset": Arm("SGD, random thirds", _UNIFORM | {"learner.draw": "random_subset"}, context=True),
    "loss": Arm("v = loss", _with_score("loss"), context=True),
    "last_layer": Arm("v = last-layer bound", _with_score("last_layer"), context=True),
    "issgd_c10": Arm("paper's ISSGD, c = 10", _issgd(10.0), context=True),
    "issgd_c1": Arm("paper's ISSGD, c = 1", _issgd(1.0), context=True),
    "calibrated_refresh": Arm("calibrated, refresh alone", _REFRESH_ONLY),
    "calibrated_workers": Arm("calibrated, a worker alone", {"learner.refresh": False}),
    "calibrated_workers_100": Arm(
        "calibrated, a worker alone at half of its time", {"learner.refresh": False} | _workers(1000, 10), data=_LARGE
    ),
    "calibrated_workers_50": Arm(
        "calibrated, a worker alone at a quarter of its time",
        {"learner.refresh": False} | _workers(500, 10),
        data=_LARGE,
    ),
    "calibrated_50": Arm("calibrated, a worker at a quarter of its time", _workers(500, 10), data=_LARGE),
    "calibrated": Arm("calibrated, a worker and refresh", {}),
    "calibrated_3": Arm("calibrated, three workers and refresh", _workers(3 * 400, 2), data=_LARGE),
    "calibrated_7": Arm("calibrated, seven workers and refresh", _workers(7 * 400, 2), data=_LARGE),
    "stride": Arm("evenly spaced visits, refresh alone", _STRIDE | _REFRESH_ONLY),
    "stride_limited": Arm("evenly spaced visits with a limit, refresh alone", _LIMITED | _REFRESH_ONLY),
    "stride_limited_1": Arm("evenly spaced visits with a limit, a worker and refresh", _LIMITED, data=_LARGE),
    "stride_limited_3": Arm(
        "evenly spaced visits with a limit, three workers and refresh", _LIMITED | _workers(3 * 400, 2), data=_LARGE
    ),
    "stride_limited_7": Arm(
        "evenly spaced visits with a limit, seven workers and refresh", _LIMITED | _workers(7 * 400, 2), data=_LARGE
    ),
    "stride_by_gain": Arm(
        "evenly spaced visits, refresh alone, rate by gain", _STRIDE | _REFRESH_ONLY | {"learner.rate_by_gain": True}
    ),
    "stride_1": Arm("evenly spaced visits, a worker and refresh", _STRIDE, data=_LARGE),
    "stride_3": Arm("evenly spaced visits, three workers and refresh", _STRIDE | _workers(3 * 400, 2), data=_LARGE),
    "stride_7": Arm("evenly spaced visits, seven workers and refresh", _STRIDE | _workers(7 * 400, 2), data=_LARGE),
    "exact": Arm("oracle: every example scored before every step", _ORACLE, context=True, data=("digits",)),
}


# A decaying rate depends on the number of steps: an arm that must end on one device together with SGD, or in half of
# its time, is planned for fewer steps, by the measured cost of a step; a multiple of eval_every.
_IN_LESS_TIME = {
    "calibrated_refresh_3600": Arm(
        "calibrated, refresh alone, 3,600 steps", _REFRESH_ONLY | {"steps": 3600}, data=_LARGE
    ),
    **{
        f"stride_{steps}": Arm(
            f"evenly spaced visits, refresh alone, {steps:,} steps",
            _STRIDE | _REFRESH_ONLY | {"steps": steps},
            data=_LARGE,
        )
        for steps in (4000, 4800, 6000)
    },
    **{
        f"stride_limited_{steps}": Arm(
            f"evenly spaced visits with a limit, refresh alone, {steps:,} steps",
            _LIMITED | _REFRESH_ONLY | {"steps": steps},
            data=_LARGE,
        )
        for steps in (3200, 4000)
    },
    "calibrated_50_6000": Arm(
        "calibrated, a worker at a quarter of its time, 6,000 steps", _workers(500, 10) | {"steps": 6000}, data=_LARGE
    ),
}


def _architectures() -> dict[str, Arm]:
    """Returns each network without importance sampling, with it, and with evenly spaced visits; a CPU can train all."""
    networks = {
        "mlp": ("MLP", {}),
        "convnet": ("ConvNet", {"model.convnet.channels": (8, 16, 16, 32), "model.convnet.dense_size": 64}),
        "gru": ("GRU over rows", {"model.gru.units": 64}),
        "transformer": ("transformer over patches", {"model.transformer.width": 32, "model.transformer.patch_size": 7}),
    }
    # Grids of networks whose best rate was at an end of the study's grid.
    rates = {
        "convnet": (0.0025, 0.005, 0.01, 0.02),
        "gru": (0.02, 0.05, 0.1, 0.2, 0.4),
        "transformer": (0.005, 0.01, 0.02, 0.05),
    }
    arms = {}
    for name, (label, size) in networks.items():
        network = {"model.name": name, **size}
        common = {"context": True, "baseline": f"{name}_uniform", "learning_rates": rates.get(name)}
        arms[f"{name}_uniform"] = Arm(f"{label}, SGD", network | _UNIFORM, **common)
        arms[f"{name}_calibrated"] = Arm(f"{label}, calibrated", network, **common)
        arms[f"{name}_stride"] = Arm(f"{label}, evenly spaced visits", network | _STRIDE, **common)
        arms[f"{name}_limited"] = Arm(f"{label}, evenly spaced visits with a limit", network | _LIMITED, **common)
    return arms


def _stalenesses() -> dict[str, Arm]:
    """Returns arms from fresh to very stale scores. A worker scores 200 examples a step."""
    arms = {"uniform": Arm("SGD", _UNIFORM, context=True), "refresh": Arm("refresh alone", _REFRESH_ONLY, context=True)}
    for workers in (1, 3, 7, 15, 31):
        label = f"{workers} worker{'s' if workers > 1 else ''}"
        arms[f"workers_{workers}"] = Arm(f"{label}, rounds of 2 steps", _workers(400 * workers, 2), context=True)
    for steps in (20, 100):
        arms[f"round_{steps}"] = Arm(f"3 workers, rounds of {steps} steps", _workers(600 * steps, steps), context=True)
    for delay in (50, 200, 800):
        arms[f"delay_{delay}"] = Arm(
            f"3 workers, known after {delay} steps",
            _workers(600 * 50, 50) | {"schedule.score_delay": delay},
            context=True,
        )
    return arms


def _peers() -> dict[str, Arm]:
    """Returns 1 to 8 asynchronous learners that draw uniformly, or by the scores of their own minibatches."""
    arms = {}
    for name, label, options in (("uniform", "SGD", _UNIFORM), ("calibrated", "calibrated peers", _REFRESH_ONLY)):
        for learners in (1, 2, 4, 8):
            arm_label = f"{label}, {learners} learner{'s' if learners > 1 else ''}"
            overrides = options | {"learner.asynchronous": learners}
            arms[f"{name}_{learners}"] = Arm(arm_label, overrides, context=True)
    return arms


def _uniform_shares() -> dict[str, Arm]:
    """Returns evenly spaced visits with v from nearly the expected norm alone to nearly constant."""
    arms = {"uniform": Arm("SGD, i.i.d.", _UNIFORM | {"learner.draw": "independent"})}
    for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        overrides = _STRIDE | _REFRESH_ONLY | {"proposal.uniform_fraction": share}
        arms[f"share_{share:g}"] = Arm(f"evenly spaced visits, uniform share {share:g}", overrides)
    return arms


STUDIES = {
    "svhn": Study(
        # The paper's network, momentum, batch, chunk and cadence: three workers with 2,048 examples in 32 steps.
        base={
            "learner.momentum": 0.95,
            "model.mlp.init_stddev": 0.01,
            "model.mlp.hidden_sizes": (2048,) * 4,
            "workers.chunk_size": 3 * 2048,
            "schedule.steps_per_round": 32,
            "schedule.score_delay": 32,
            "eval_every": 800,
        },
        arms=_paper_pairs(),
        learning_rates=(),
        data=("svhn", "svhn_extra", "fashion_mnist"),
    ),
    "fair": Study(
        base={},
        arms=_FAIR_ARMS,
        learning_rates=(0.005, 0.01, 0.02, 0.05),
        data=("fashion_mnist", "svhn", "digits"),
    ),
    "fair_decay": Study(
        base={"learner.lr_schedule": "cosine"},
        arms=_FAIR_ARMS | _IN_LESS_TIME,
        learning_rates=(0.01, 0.02, 0.05, 0.1),
        data=("fashion_mnist", "svhn", "digits"),
    ),
    "architectures": Study(
        base={"steps": 2000, "eval_every": 200},
        arms=_architectures(),
        learning_rates=(0.01, 0.02, 0.05, 0.1),
        data=("fashion_mnist", "svhn", "digits"),
        on_data={"digits": {"model.transformer.patch_size": 2, "eval_every": 50}},
    ),
    "uniform_share": Study(
        base={},
        arms=_uniform_shares(),
        learning_rates=(0.05,),  # where shares differ; at lower rates none does better than SGD
        data=("digits", "fashion_mnist", "svhn"),
        rates_on={"fashion_mnist": (0.01,), "svhn": (0.005,)},  # the best of evenly spaced visits in `fair`
    ),
    "uniform_share_decay": Study(
        base={"learner.lr_schedule": "cosine"},
        arms=_uniform_shares(),
        learning_rates=(0.02,),
        data=("fashion_mnist", "svhn"),
        rates_on={"svhn": (0.01,)},  # both: the best of evenly spaced visits in `fair_decay`
    ),
    "language": Study(
        base={},
        arms={
            name: _FAIR_ARMS[name] for name in ("uniform", "shuffled", "calibrated_refresh", "stride", "stride_limited")
        },
        learning_rates=(0.002, 0.005),
        data=("text",),
    ),
    "staleness": Study(
        base={"steps": 2000, "eval_every": 200},
        arms=_stalenesses(),
        learning_rates=(0.02,),
        data=("fashion_mnist", "svhn"),
    ),
    "asgd": Study(
        base={"steps": 4000, "eval_every": 200},
        arms=_peers(),
        learning_rates=(0.0025, 0.005, 0.01, 0.02, 0.05),
        data=("fashion_mnist", "svhn", "digits"),
    ),
}


def get_study(name: str) -> Study:
    """Returns the study of that name.

    Raises:
      InputError: there is none; names the nearest.
    """
    if name not in STUDIES:
        raise InputError(f"no study {name!r}: {nearest(name, list(STUDIES))}")
    return STUDIES[name]

"""Handwritten digits, embedded in scikit-learn: what the method does, in seconds, with nothing to download.

    python -m experiments.compare --config=experiments/configs/digits.py --workdir=runs/digits      (both arms)
    python -m issgd_jax.main --config=experiments/configs/digits.py --workdir=runs/digits/importance

Cost: 25 s for both arms on two CPU cores, most of it compilation.

Expected (seed 0, after 1,000 steps, importance sampling / uniform): training loss 0.0003 / 0.0007, training error 0 % /
0.07 %, test error 2.2 % / 1.7 % (8 and 6 of 360), variance gain 7. The loss stays below 0.01 from step 175 / 475 on.
The rate is at the edge of what uniform sampling bears; at --config.learner.learning_rate=0.02 the noise decides less,
and uniform sampling ends lower: 0.0018 / 0.0014.
"""

from issgd_jax import config as config_lib


def get_config(options: str = ""):
    config = config_lib.default()
    config.steps = 1000
    config.eval_every = 25

    config.model.mlp.hidden_sizes = (128, 128)
    # A small minibatch at a high rate: the noise of the gradient decides how fast the loss falls.
    config.learner.batch_size = 16
    config.learner.learning_rate = 0.05

    # One learner and three workers, simulated; a sweep over the 1,437 examples takes 4 rounds, 40 steps.
    config.devices.host_platform_count = 4
    config.workers.chunk_size = 120
    config.schedule.steps_per_round = 10
    config.schedule.score_delay = 10
    return config_lib.with_options(config, options)

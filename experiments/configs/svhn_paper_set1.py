"""The paper's experiment, set 1: permutation-invariant SVHN, learning rate 0.01, smoothing constant +10.

    issgd-jax train --config=experiments/configs/svhn_paper_set1.py --workdir=runs/svhn_set1

The SGD arm of the pair: --config.proposal.name=uniform. Every value is the paper's (Alain et al. 2015, section 5, and
the authors' code) unless its comment says otherwise.

Data: `svhn_cropped` of TFDS with its `extra` split, 574,168 training images. Without `extra`:
--config.data.train_split=train.

Cost: not run at full size so far. On two CPU cores a learner step takes 0.1 s, and 256 gradient norms 0.11 s
(experiments.benchmarks); it wants GPUs. What was run here is `:smoke`, and 12 steps of the full network on the 73,257
training images.

Expected: the paper's figures 2 to 4. The whole 2 x 2 of rates and smoothings with all seeds:
`python -m experiments.paper.sweep --study=svhn --data=svhn_extra --workdir=runs/paper`.
"""

from issgd_jax import config as config_lib


def get_config(options: str = ""):
    config = config_lib.default()
    config.steps = 50_000  # ours: the paper gives hours, not steps
    config.eval_every = 1000  # ours
    config.data.name = "svhn_cropped"
    config.data.train_split = "train[:95%]+extra[:95%]"  # 574,168 images; the remaining 5 % were for validation
    config.data.test_split = "test"

    config.model.mlp.hidden_sizes = (2048,) * 4  # 18,903,050 parameters
    config.model.mlp.init_stddev = 0.01
    config.learner.batch_size = 128
    config.learner.optimizer = "sgd"
    config.learner.learning_rate = 0.01
    config.learner.momentum = 0.95
    config.learner.nesterov = True
    config.learner.draw = "independent"
    config.learner.refresh = False

    config.devices.workers = 3
    config.workers.chunk_size = 2048
    config.schedule.name = "relaxed"
    config.schedule.steps_per_round = 32  # learner steps between two fetches of scores
    config.schedule.score_delay = 32  # ours: the paper has no fixed delay

    config.proposal.name = "proportional"
    config.proposal.smoothing = 10.0
    config.proposal.max_staleness = None  # the paper dropped scores older than 20 s, which is biased
    return config_lib.with_options(config, options)

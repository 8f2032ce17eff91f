"""The paper's experiment, set 2: permutation-invariant SVHN, learning rate 0.001, smoothing constant +1.

    issgd-jax train --config=experiments/configs/svhn_paper_set2.py --workdir=runs/svhn_set2

The SGD arm of the pair: --config.proposal.name=uniform, at the same rate; the authors' code gave 0.01 to the arm with
importance sampling, so that their pair was confounded. Everything else is as in set 1.

Cost and expected result: see set 1.
"""

from experiments.configs import svhn_paper_set1


def get_config(options: str = ""):
    config = svhn_paper_set1.get_config(options)
    config.learner.learning_rate = 0.001
    config.proposal.smoothing = 1.0
    return config

"""The problem of a config: a network on images."""

import re

import jax

from issgd_jax.learning.evaluate import CHUNK_SIZE, make_evaluate
from issgd_jax.task import images
from tests.helpers import smoke


def test_loss_and_error_of_a_split_take_one_forward_pass():
    """Red if XLA computes the network twice: measurements then take twice as long."""
    problem = images.make_problem(smoke())
    params = problem.init(jax.random.key(0))
    examples = jax.tree.map(lambda x: x[: 2 * CHUNK_SIZE], problem.examples("train"))

    def products(functions):
        return len(re.findall(r"\bdot\(", make_evaluate(functions).lower(params, examples).compile().as_text()))

    alone = products({"loss": problem.loss_fn})
    assert alone > 0 and products({"loss": problem.loss_fn, **problem.metrics}) == alone

"""Sizes of the benchmark."""

import dataclasses
from collections.abc import Mapping

from experiments.benchmarks.learner_step import CASES, Case


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of all parts.

    Attributes:
      matrix: rows of the square matrices whose product gives the matrix rate.
      vector: numbers of the vector that gives the bandwidth.
      models: {model of gradnorm_models: its arguments}, whose scoring is measured.
      learner: of the learner's step.
      chunk_size: examples in a round of scoring beside the learner.
      sampler: numbers of examples.
      gram: (B, T, I, J): examples, uses of a layer, inputs and outputs of the layer.
      num_pairs: calls of each function that is timed.
      seconds: limit on these calls, of which there are at least 3, in each part.
      limit: seconds after which no part begins.
    """

    matrix: int
    vector: int
    models: Mapping[str, Mapping[str, int]]
    learner: Case
    chunk_size: int
    sampler: tuple[int, ...]
    gram: tuple[tuple[int, int, int, int], ...]
    num_pairs: int
    seconds: float
    limit: float


DIGITS, SVHN = CASES.values()
SIZES = {
    "small": Size(
        matrix=1024,
        vector=2**25,
        models={"mlp": {"batch_size": 128}, "convnet": {}, "gru": {}, "transformer": {"batch_size": 4}},
        learner=dataclasses.replace(DIGITS, num_pairs=15),
        chunk_size=256,
        sampler=(10**4, 10**5, 10**6),
        gram=((4, 128, 256, 256), (2, 512, 256, 256)),
        num_pairs=9,
        seconds=10,
        limit=600,
    ),
    "full": Size(
        matrix=8192,
        vector=2**29,
        models={
            "mlp": {"batch_size": 2048},
            "convnet": {"batch_size": 1024},
            "gru": {"batch_size": 1024},
            "transformer": {"batch_size": 128},
        },
        learner=SVHN,
        chunk_size=2048,
        sampler=(10**6, 10**7, 10**8),
        gram=((64, 512, 1024, 1024), (16, 2048, 1024, 1024)),
        num_pairs=21,
        seconds=10,
        limit=360,
    ),
}

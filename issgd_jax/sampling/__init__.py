"""Draws in proportion to scores: a library of its own that knows no loss, no optimiser and no config."""

from issgd_jax.limits import LimitedWeights
from issgd_jax.sampling.calibrated import Calibrated
from issgd_jax.sampling.draws import DRAWS
from issgd_jax.sampling.proposal import Mixture, Proportional, Uniform
from issgd_jax.sampling.sampler import Sampler
from issgd_jax.sampling.state import SamplerState
from issgd_jax.sampling.store import ScoreStore
from issgd_jax.sampling.table import Draw, Table, build_table, draw, effective_sample_size, uniform_table

__all__ = [
    "DRAWS", "Calibrated", "Draw", "LimitedWeights", "Mixture", "Proportional", "Sampler", "SamplerState", "ScoreStore",
    "Table", "Uniform", "build_table", "draw", "effective_sample_size", "uniform_table",
]  # fmt: skip

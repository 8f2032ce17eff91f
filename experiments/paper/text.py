"""A language model of bytes: a causal transformer of two layers on a text, in pieces of 128 bytes.

The text is any file that the environment variable ISSGD_TEXT names; the study has Debian's King James Bible:

    apt-get install bible-kjv
    bible -f gen1:1-rev22:21 > kjv.txt
    export ISSGD_TEXT=$PWD/kjv.txt

Of its first million bytes, nine tenths are training data and the rest is test data: split by position.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import gradnorm_models
from issgd_jax import Problem
from issgd_jax.errors import InputError

LENGTH, WIDTH, LAYERS, SYMBOLS = 128, 64, 2, 256
NUM_BYTES, TEST_SHARE = 10**6, 10  # a tenth
VARIABLE = "ISSGD_TEXT"


def make_problem() -> Problem:
    """Returns the problem; its loss and error are means over the bytes of a piece, in nats and in wrong predictions.

    Raises:
      InputError: there is no text, or it is too short.
    """
    pieces = _pieces(_read())
    num_test = len(pieces) // TEST_SHARE
    return Problem(
        init=init,
        loss_fn=gradnorm_models.transformer_loss,
        metrics={"error": error},
        train=(pieces[:-num_test],),
        test=(pieces[-num_test:],),
        name="text",
    )


def init(key: jax.Array) -> dict:
    """Returns random parameters."""
    make, scale = gradnorm_models.Init(_Random(key)), WIDTH**-0.5
    return {
        "embedding": make.normal(SYMBOLS, WIDTH, scale=scale),
        "positions": make.normal(LENGTH, WIDTH, scale=scale),
        **{f"block_{i}": gradnorm_models.block_params(make, WIDTH) for i in range(LAYERS)},
        "norm": make.layer_norm(WIDTH),
    }


def error(params: dict, tokens: jax.Array) -> jax.Array:
    """Returns the share of the bytes that are not the most likely ones."""
    return jnp.mean(jnp.argmax(gradnorm_models.transformer_logits(params, tokens[:-1]), axis=-1) != tokens[1:])


class _Random:
    """Random numbers of a key, as `numpy.random.Generator` gives them."""

    def __init__(self, key: jax.Array):
        self._key = key

    def standard_normal(self, shape: tuple[int, ...]) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return jax.random.normal(key, shape)


def _read() -> bytes:
    path = os.environ.get(VARIABLE)
    if not path:
        raise InputError(f"there is no text: set {VARIABLE} to a file of at least {NUM_BYTES:,} bytes")
    try:
        content = pathlib.Path(path).read_bytes()[:NUM_BYTES]
    except OSError as problem:
        raise InputError(f"{VARIABLE}={path} cannot be read: {problem}") from problem
    if len(content) < NUM_BYTES:
        raise InputError(f"{VARIABLE}={path} has {len(content):,} bytes: choose a text of at least {NUM_BYTES:,}")
    return content


def _pieces(text: bytes) -> np.ndarray:
    """Returns u8[N, LENGTH + 1]: each piece ends with the byte that the next begins with."""
    starts = np.arange(0, len(text) - LENGTH, LENGTH)
    return np.frombuffer(text, np.uint8)[starts[:, None] + np.arange(LENGTH + 1)]

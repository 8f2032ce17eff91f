"""Networks for one example at a time; the only file that imports flax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as two pure functions of ONE image f32[H, W, channels].

    Attributes:
      init: `(key, image) -> params`.
      apply: `(params, image) -> logits f32[C]`.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


class _MLP(nn.Module):
    num_classes: int
    hidden_sizes: Sequence[int]
    init_stddev: float | None

    @nn.compact
    def __call__(self, image):
        init = nn.initializers.he_normal() if self.init_stddev is None else nn.initializers.normal(self.init_stddev)
        x = image.reshape(-1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size, kernel_init=init)(x))
        return nn.Dense(self.num_classes, kernel_init=init)(x)


class _ConvNet(nn.Module):
    num_classes: int
    channels: Sequence[int]
    dense_size: int

    @nn.compact
    def __call__(self, image):
        x = image
        for i, channels in enumerate(self.channels):
            x = nn.relu(nn.Conv(channels, (3, 3), kernel_init=nn.initializers.he_normal())(x))
            if i % 2 == 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.dense_size, kernel_init=nn.initializers.he_normal())(x.reshape(-1)))
        return nn.Dense(self.num_classes)(x)


class _GRU(nn.Module):
    num_classes: int
    units: int

    @nn.compact
    def __call__(self, image):
        rows = image.reshape(image.shape[0], -1)
        # flax would start in float32 whatever the parameters are, and stay there.
        states = nn.RNN(nn.GRUCell(self.units))(rows, initial_carry=jnp.zeros(self.units, rows.dtype))
        return nn.Dense(self.num_classes)(states[-1])


class _Transformer(nn.Module):
    num_classes: int
    num_layers: int
    width: int
    num_heads: int
    patch_size: int

    @nn.compact
    def __call__(self, image):
        size = self.patch_size
        x = nn.Conv(self.width, (size, size), strides=(size, size), name="patches")(image).reshape(-1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape)
        for _ in range(self.num_layers):
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.num_classes)(jnp.mean(nn.LayerNorm()(x), axis=0))


def mlp(num_classes: int, *, hidden_sizes: Sequence[int] = (256,) * 4, init_stddev: float | None = None) -> Model:
    """Returns a fully connected ReLU network on the flattened image; biases start at 0.

    Args:
      num_classes: C.
      hidden_sizes: units of each hidden layer.
      init_stddev: standard deviation of the initial kernels (paper: 0.01); None: He et al. 2015.

    Example:
      >>> model = mlp(3, hidden_sizes=(5,))
      >>> image = jnp.ones((2, 2, 1))
      >>> model.apply(model.init(jax.random.key(0), image), image).shape
      (3,)
    """
    return _model(_MLP(num_classes, tuple(hidden_sizes), init_stddev))


def convnet(num_classes: int, *, channels: Sequence[int] = (32, 32, 64, 64), dense_size: int = 256) -> Model:
    """Returns 3x3 convolutions with ReLU, 2x2 max pooling after every second one, and two dense layers.

    Args:
      num_classes: C.
      channels: of each convolution.
      dense_size: units of the hidden dense layer.
    """
    return _model(_ConvNet(num_classes, tuple(channels), dense_size))


def gru(num_classes: int, *, units: int = 128) -> Model:
    """Returns a gated recurrent network over the rows of the image, with a dense layer on its last state.

    Args:
      num_classes: C.
      units: size of the state.
    """
    return _model(_GRU(num_classes, units))


def transformer(
    num_classes: int, *, num_layers: int = 2, width: int = 64, num_heads: int = 4, patch_size: int = 4
) -> Model:
    """Returns a pre-norm transformer over square patches, with a dense layer on the mean of its tokens.

    Args:
      num_classes: C.
      num_layers: blocks of attention and MLP.
      width: size of a token, a multiple of num_heads.
      num_heads: attention heads.
      patch_size: side of a patch in pixels.
    """
    return _model(_Transformer(num_classes, num_layers, width, num_heads, patch_size))


MODELS = {"mlp": mlp, "convnet": convnet, "gru": gru, "transformer": transformer}


def _model(module: nn.Module) -> Model:
    return Model(
        init=lambda key, image: module.init(key, image)["params"],
        apply=lambda params, image: module.apply({"params": params}, image),
    )

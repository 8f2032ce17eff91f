"""Losses of gradnorm_models as PyTorch modules of standard layers, with the same parameters."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmarks.gradnorm_models import HEADS


def mlp(params, batch):
    """Returns `(module, inputs, targets)`; `example_losses` takes the module's logits."""
    layers = [linear(params[f"dense_{i}"]) for i in range(len(params))]
    hidden = [module for layer in layers[:-1] for module in (layer, nn.ReLU())]
    return nn.Sequential(*hidden, layers[-1]), *tensors(*batch)


def convnet(params, batch):
    stages = []
    for i in range(4):
        stages += [conv(params[f"conv_{i}"]), nn.ReLU()] + [nn.MaxPool2d(2)] * (i % 2)
    kernel = params["dense_0"]["kernel"].reshape(8, 8, 64, 256).transpose(2, 0, 1, 3).reshape(-1, 256)
    first = linear({"kernel": kernel, "bias": params["dense_0"]["bias"]})
    module = nn.Sequential(*stages, nn.Flatten(), first, nn.ReLU(), linear(params["dense_1"]))
    images, labels = batch
    return module, *tensors(images.transpose(0, 3, 1, 2), labels)


def gru(params, batch, layer=nn.GRU):
    """Returns `(module, inputs, targets)`; layer: nn.GRU, or another class with its arguments and parameters."""
    return Recurrent(params, layer), *tensors(*batch)


def transformer(params, batch):
    (tokens,) = batch
    return Transformer(params), *tensors(tokens[:, :-1], tokens[:, 1:])


MODULES = {"mlp": mlp, "convnet": convnet, "gru": gru, "transformer": transformer}


def example_losses(logits, targets):
    """Returns the softmax cross-entropy f32[B], the mean over positions where an example has several."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


class Recurrent(nn.Module):
    """GRU, classified from its last state."""

    def __init__(self, params, layer):
        super().__init__()
        gates = params["gru"]
        (features, triple), units = gates["input"]["kernel"].shape, len(gates["state"]["kernel"])
        assert triple == 3 * units
        kernels = {f"weight_{short}_l0": gates[name]["kernel"].T for short, name in (("ih", "input"), ("hh", "state"))}
        biases = {f"bias_{short}_l0": gates[name]["bias"] for short, name in (("ih", "input"), ("hh", "state"))}
        self.gru = filled(layer(features, units, batch_first=True), **kernels, **biases)
        self.dense = linear(params["dense"])

    def forward(self, sequences):
        outputs, _ = self.gru(sequences)
        return self.dense(outputs[:, -1])


class Transformer(nn.Module):
    """Causal pre-LN transformer; the head's matrix is the parameter of the embedding."""

    def __init__(self, params):
        super().__init__()
        self.embedding = embedding(params["embedding"])
        self.positions = embedding(params["positions"])
        self.blocks = nn.Sequential(*(Block(params[f"block_{i}"]) for i in range(len(params) - 3)))
        self.norm = layer_norm(params["norm"])
        self.head = nn.Linear(*reversed(params["embedding"].shape), bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions(positions))))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with a residual connection."""

    def __init__(self, params):
        super().__init__()
        self.norm_0, self.norm_1 = layer_norm(params["norm_0"]), layer_norm(params["norm_1"])
        self.query_key_value, self.attention_out = linear(params["query_key_value"]), linear(params["attention_out"])
        self.dense_0, self.dense_1 = linear(params["dense_0"]), linear(params["dense_1"])
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x):
        x = x + self.attention(self.norm_0(x))
        return x + self.dense_1(self.gelu(self.dense_0(self.norm_1(x))))

    def attention(self, x):
        heads = self.query_key_value(x).unflatten(-1, (3, HEADS, -1)).movedim(-2, -4)
        query, key, value = heads.unbind(-2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.movedim(-3, -2).flatten(-2))


def linear(params):
    return filled(nn.Linear(*params["kernel"].shape), weight=params["kernel"].T, bias=params["bias"])


def conv(params):
    layer = nn.Conv2d(*params["kernel"].shape[2:], 3, padding=1)
    return filled(layer, weight=params["kernel"].transpose(3, 2, 0, 1), bias=params["bias"])


def layer_norm(params):
    return filled(nn.LayerNorm(len(params["scale"])), weight=params["scale"], bias=params["bias"])


def embedding(matrix):
    return filled(nn.Embedding(*matrix.shape), weight=matrix)


def filled(module, **params):
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in params.items()})
    return module


def tensors(inputs, targets):
    inputs = torch.from_numpy(np.ascontiguousarray(inputs))
    return inputs.long() if inputs.dtype == torch.int32 else inputs, torch.from_numpy(targets).long()

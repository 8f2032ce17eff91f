"""Models of other libraries: the recipes of docs/gradient-norms.md are right, and what is no parameter is refused."""

import functools
import inspect

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from issgd_jax.gradnorm import (
    check,
    clipped_grad,
    explain,
    per_example,
    per_example_grad_norms,
    value_grad_and_norms,
)

RNG = np.random.default_rng(0)
X, Y = jnp.float32(RNG.normal(size=(6, 3))), jnp.int32(RNG.integers(0, 2, 6))
KEY = jax.random.key(0)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Classifier(linen.Module):
    """Flattens a batch, so that one example is of the wrong shape."""

    @linen.compact
    def __call__(self, x, dropout=False):
        x = linen.Dense(5)(x.reshape(len(x), -1))
        x = linen.BatchNorm(use_running_average=True)(x)
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=not dropout)(x))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(self.hidden(x))))


@functools.cache
def linen_problem():
    """Returns the keyed loss of a batch, and all variables."""
    model = Classifier()
    variables = jax.jit(model.init)(KEY, X)

    def loss_fn(params, x, y, key):
        logits = model.apply({**variables, "params": params}, x, dropout=True, rngs={"dropout": key})
        return cross_entropy(logits, y).mean()

    return loss_fn, variables


def of_linen():
    loss_fn, variables = linen_problem()
    return per_example(loss_fn), variables["params"]


def of_nnx(**seeds):
    graph, params, rest = nnx.split(Network(nnx.Rngs(**seeds)), nnx.Param, ...)

    def loss_fn(params, x, y, key):
        model = nnx.merge(graph, params, rest, copy=True)
        nnx.reseed(model, default=key, dropout=key)
        return cross_entropy(model(x), y)

    return loss_fn, params


def of_equinox():
    layers = (eqx.nn.Linear(3, 5, key=KEY), eqx.nn.Lambda(jnp.tanh), eqx.nn.Dropout(0.5), eqx.nn.Linear(5, 2, key=KEY))
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)
    return lambda params, x, y, key: cross_entropy(eqx.combine(params, static)(x, key=key), y), params


def of_haiku():
    def forward(x, is_training=False):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), is_training)
        return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.5, x))

    network = hk.transform_with_state(forward)
    params, state = network.init(KEY, X, is_training=True)
    loss_fn = lambda params, x, y, key: cross_entropy(network.apply(params, state, key, x)[0], y)  # noqa: E731
    return per_example(loss_fn), params  # Haiku's BatchNorm wants a batch


RECIPES = {
    "linen": of_linen,
    "nnx, one stream": functools.partial(of_nnx, default=0),
    "nnx, named streams": functools.partial(of_nnx, params=0, dropout=1),
    "equinox": of_equinox,
    "haiku": of_haiku,
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_equal_a_loop_of_jax_grad(recipe):
    """Red if what a library keeps beside its parameters changes a loss, a norm or a gradient."""
    loss_fn, params = recipe()
    assert len(check(loss_fn, params, X, Y, keyed=True, key=KEY).rows) == 2 + 2 * len(jax.tree.leaves(params))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_each_example_and_step_has_dropout_of_its_own(recipe):
    """Red if a recipe reseeds a stream that the model does not have, and one mask serves all examples."""
    loss_fn, params = recipe()
    norms_fn = per_example_grad_norms(loss_fn, keyed=True)
    x, y = jnp.broadcast_to(X[:1], (16, 3)), jnp.zeros(16, jnp.int32)
    norms, others = (np.asarray(norms_fn(params, x, y, key=jax.random.key(seed))) for seed in range(2))
    assert len(set(norms.round(5))) > 4 and np.any(norms != others)


@pytest.mark.filterwarnings("error")
def test_state_that_changes_is_closed_over_inside_a_compiled_step():
    """Red if a traced value that loss_fn closes over is kept from an earlier step, or each step is traced again."""
    model = Classifier()
    _, variables = linen_problem()
    traces = []

    @jax.jit
    def norms_of_step(params, stats):
        traces.append(1)

        def loss_fn(params, x, y):
            return cross_entropy(model.apply({"params": params, "batch_stats": stats}, x), y).mean()

        return per_example_grad_norms(per_example(loss_fn))(params, X, Y)

    def expected(stats):
        def loss_fn(params, x, y):
            return cross_entropy(model.apply({"params": params, "batch_stats": stats}, x[None]), y[None])[0]

        gradients = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(variables["params"], X, Y)
        return jnp.sqrt(sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(gradients)))

    for step in range(3):
        stats = jax.tree.map(lambda x, step=step: x + step, variables["batch_stats"])
        np.testing.assert_allclose(norms_of_step(variables["params"], stats), expected(stats), rtol=1e-5)
    assert len(traces) == 1


def test_frozen_weights_are_closed_over_and_have_no_norm():
    """Red if the adapters' norms hold those of the frozen weights, or cost more than two outer products."""
    frozen = jnp.float32(RNG.normal(size=(3, 4)))
    adapters = {"down": jnp.float32(RNG.normal(size=(3, 2))), "up": jnp.float32(RNG.normal(size=(2, 4)))}

    def loss_fn(adapters, x):
        return jnp.sum(jnp.tanh(x @ frozen + x @ adapters["down"] @ adapters["up"]))

    check(loss_fn, adapters, X)
    assert [(row.name, row.rule) for row in explain(loss_fn, adapters, X).rows] == [
        ("['down']", "outer"),
        ("['up']", "outer"),
    ]


def nnx_lora():
    model = nnx.LoRALinear(3, 2, lora_rank=2, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss_fn = lambda params, x, y: cross_entropy(nnx.merge(graph, params, rest, copy=True)(x), y)  # noqa: E731
    return loss_fn, params, {"['lora']['lora_a'].value", "['lora']['lora_b'].value"}


class Normalized(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear, self.norm = eqx.nn.Linear(3, 2, key=key), eqx.nn.BatchNorm(2, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


def equinox_with_state(of_weight_alone):
    """Returns a loss of a model with running averages, of all its parameters or of those of a filter."""
    model, state = eqx.nn.make_with_state(Normalized)(KEY)
    _, state = jax.vmap(lambda x: model(x, state), axis_name="batch", out_axes=(0, None))(X)
    model = eqx.nn.inference_mode(model)
    is_trained = eqx.is_inexact_array
    if of_weight_alone:
        is_trained = eqx.tree_at(lambda model: model.linear.weight, jax.tree.map(lambda _: False, model), True)
    params, static = eqx.partition(model, is_trained)
    loss_fn = lambda params, x, y: cross_entropy(eqx.combine(params, static)(x, state)[0], y)  # noqa: E731
    norm = set() if of_weight_alone else {".linear.bias", ".norm.weight", ".norm.bias"}
    return loss_fn, params, {".linear.weight", *norm}


PARTS = {
    "nnx LoRA": nnx_lora,
    "equinox with state": functools.partial(equinox_with_state, False),
    "equinox, one leaf": functools.partial(equinox_with_state, True),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_a_model_may_be_params(part):
    """Red if a leaf that is not trained has a norm, or state that is closed over changes one."""
    loss_fn, params, names = part()
    assert {row.name for row in check(loss_fn, params, X, Y).rows} == {"", *names}


def test_collections_that_one_example_changes_are_aux():
    """Red if what a linen module sows is lost, or is not that of each example."""

    class Sowing(linen.Module):
        @linen.compact
        def __call__(self, x):
            self.sow("intermediates", "inputs", x)
            return linen.Dense(1)(x)[0]

    model = Sowing()
    params = model.init(KEY, X[0])["params"]
    loss_fn = lambda params, x: model.apply({"params": params}, x, mutable=["intermediates"])  # noqa: E731
    (_, collections), _, _ = value_grad_and_norms(loss_fn, has_aux=True)(params, jnp.ones(6), X)
    np.testing.assert_array_equal(collections["intermediates"]["inputs"][0], X)


def test_the_gradient_of_an_nnx_state_is_one_for_its_optimizer():
    """Red if a step with `nnx.Optimizer` needs more than the gradient as it is."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss_fn = lambda params, x, y: cross_entropy(nnx.merge(graph, params, rest, copy=True)(x), y)  # noqa: E731
    _, gradient, _ = value_grad_and_norms(loss_fn)(params, jnp.ones(6), X, Y)
    before = np.asarray(model.kernel[...])
    nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param).update(model, gradient)
    np.testing.assert_allclose(before - model.kernel[...], 0.5 * gradient["kernel"][...], rtol=1e-4, atol=1e-6)


def test_none_in_params_stays_none():
    """Red if a place without a parameter becomes a leaf, or is lost from the gradient or the norms."""
    params = {"w": jnp.ones(3), "bias": None}
    step = value_grad_and_norms(lambda p, x: p["w"] @ x, per_leaf=True)
    _, gradient, norms = step(params, jnp.ones(6), X)
    assert gradient["bias"] is None and norms["bias"] is None
    np.testing.assert_allclose(norms["w"], jnp.linalg.norm(X, axis=1), rtol=1e-5)


def test_optax_losses_of_one_example_and_of_a_batch():
    """Red if a loss that adds its outputs, or one that wants a batch, has other norms than jax.grad gives."""
    kernel = jnp.float32(RNG.normal(size=(3, 5)))
    sounds, words = jnp.float32(RNG.normal(size=(4, 10, 3))), jnp.int32(RNG.integers(1, 5, (4, 3)))

    def recognition(kernel, x, labels):
        logits = x @ kernel
        return optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, jnp.zeros(labels.shape))

    check(per_example(recognition), kernel, sounds, words)
    check(lambda kernel, x, y: optax.huber_loss(x @ kernel, y).sum(), kernel, X, X @ kernel + 1)


def test_a_module_of_parameters_alone_is_params():
    """Red if an nnx or equinox module that holds nothing else is refused, or its gradient is of another structure."""
    for model in nnx.Linear(3, 2, rngs=nnx.Rngs(0)), eqx.nn.Linear(3, 2, key=KEY):
        loss_fn = lambda model, x, y: cross_entropy(model(x), y)  # noqa: E731
        check(loss_fn, model, X, Y)
        _, gradient, _ = value_grad_and_norms(loss_fn)(model, jnp.ones(6), X, Y)
        assert jax.tree.structure(gradient) == jax.tree.structure(model)


SPLIT, PARTITION = r"nnx.split\(model, nnx.Param, ...\)", r"eqx.partition\(model, eqx.is_inexact_array\)"


def networks_that_are_no_params():
    network = Network(nnx.Rngs(0))
    running_averages = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    state = TrainState.create(apply_fn=jnp.dot, params={"w": X}, tx=optax.sgd(0.1)).replace(step=jnp.int32(0))
    counted = eqx.nn.BatchNorm(3, "batch", mode="batch")
    return {
        "nnx module": (network, f"params.dropout.rngs.count.* has dtype uint32.*{SPLIT}"),
        "nnx state": (nnx.state(network), rf"params\['dropout'\].* has dtype uint32.*{SPLIT}"),
        "nnx running averages": (running_averages, f"params has leaves of type nnx.BatchStat.*{SPLIT}"),
        "linen variables": (linen_problem()[1], r"collections \['batch_stats', 'params'\].*pass params\['params'\]"),
        "train state": (state, "params.step has dtype int32.*pass state.params"),
        "linen module": (Classifier(), r"argument 0 is of type Classifier:.*pass `model.init\(...\)\['params'\]`"),
        "equinox state": (counted, f"argument 0 has the leaf .* of type .*{PARTITION}"),
        "haiku network": (hk.transform(abs), "argument 0 has the leaf .init of type function.*close over it"),
        "integer": ({"step": jnp.int32(0)}, r"params\['step'\] has dtype int32.*close over it, or pass one for each"),
        "key": ({"key": KEY}, r"params\['key'\] has dtype key<fry>.*pass one random key for the batch as key="),
        "complex": (jnp.ones(3, complex), "has dtype complex64.*make its real and its imaginary part two leaves"),
        "text": ({"name": np.array("a")}, r"the leaf \['name'\] of type ndarray and dtype <U1.*encode it as numbers"),
    }


@pytest.mark.parametrize("name", networks_that_are_no_params())
def test_what_is_no_parameter_is_refused_with_a_recipe(name):
    """Red if running averages are trained, or a message lacks the leaf, its type, or a remedy that works."""
    params, message = networks_that_are_no_params()[name]
    with pytest.raises(TypeError, match=f"{message}.*see Frameworks in docs/gradient-norms.md"):
        per_example_grad_norms(lambda params, x: jnp.sum(x))(params, X)


FUNCTIONS = {
    "norms": lambda loss_fn, *args: per_example_grad_norms(loss_fn)(*args),
    "all three": lambda loss_fn, params, *batch: value_grad_and_norms(loss_fn)(params, jnp.ones(6), *batch),
    "clipped": lambda loss_fn, *args: clipped_grad(loss_fn, 1.0)(*args),
    "check": check,
    "explain": explain,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_static_leaves_are_named_by_every_function(function):
    """Red if an activation function as a leaf meets JAX's own words about jit."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    with pytest.raises(TypeError, match=f"argument 0 has the leaf .activation of type .*{PARTITION}"):
        function(lambda model, x, y: cross_entropy(model(x), y), model, X, Y)


def test_what_examples_share_is_no_batch_argument():
    """Red if the words for other leading axes, or for static arguments, do not say where such values go."""
    loss_fn = lambda params, rest, x: params @ x  # noqa: E731
    _, rest = nnx.split(nnx.BatchNorm(5, rngs=nnx.Rngs(0)))
    for shared, error in ((rest, ValueError), (jnp.float32(0), ValueError), (True, ValueError), ("train", TypeError)):
        with pytest.raises(error, match="argument 1.*close over"):
            per_example_grad_norms(loss_fn)(jnp.ones(3), shared, X)


@pytest.mark.parametrize("wrap", [lambda loss_fn: loss_fn, per_example])
def test_a_module_that_loss_fn_changes_is_to_be_copied(wrap):
    """Red if flax's error about trace levels comes without the words that remedy it."""
    model = Network(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, x, y):
        return cross_entropy(nnx.merge(graph, params, rest)(x), y).mean()

    with pytest.raises(Exception, match="different trace level") as raised:
        per_example_grad_norms(wrap(loss_fn))(params, X, Y)
    assert any("copy=True" in note for note in raised.value.__notes__)


def test_a_batch_first_linen_model_is_told_of_per_example():
    """Red if flax's error about a parameter's shape comes without the words that remedy it."""
    loss_fn, variables = linen_problem()
    with pytest.raises(Exception, match=r'parameter "kernel" in "/Dense_0"') as raised:
        per_example_grad_norms(loss_fn, keyed=True)(variables["params"], X, Y, key=KEY)
    assert any("wrap it, issgd_jax.per_example(loss_fn)" in note for note in raised.value.__notes__)


def test_errors_inside_a_loss_stay_as_they_are():
    """Red if an error of the loss is taken for one of its arguments, or options of jit are lost."""
    norms_fn = per_example_grad_norms(lambda params, x: params @ x + "1")
    with pytest.raises(TypeError, match="unsupported operand"):
        norms_fn(jnp.ones(3), X)
    assert inspect.isfunction(norms_fn) and per_example_grad_norms(lambda p, x: p @ x).lower(jnp.ones(3), X)

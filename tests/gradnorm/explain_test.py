"""The explanation is that of the rules taken, and costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from issgd_jax.gradnorm import explain
from tests.gradnorm.helpers import model_problem


def test_explain_names_the_rule_of_every_leaf():
    rng = np.random.default_rng(0)
    shapes = {"table": (50, 4), "kernel": (3, 3, 1, 4), "late": (2, 2, 64, 64), "recurrent": (4, 4), "once": (4, 5),
              "offset": (4,), "long": (4, 4), "unused": (2, 2)}  # fmt: skip
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}

    def loss_fn(p, image, small, tokens):
        x = jax.lax.conv_general_dilated(
            image[None], p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.conv_general_dilated(
            small[None], p["late"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        state, _ = jax.lax.scan(lambda s, x: (jnp.tanh(s @ p["recurrent"] + x), None), jnp.zeros(4), p["table"][tokens])
        z = jnp.tanh(x[0].reshape(-1, 4) @ p["long"]) + p["offset"]
        return jnp.sum(jnp.tanh(state @ p["once"])) + jnp.sum(jnp.tanh(y)) + jnp.mean(z**2)

    batch = jnp.ones((2, 8, 8, 1)), jnp.ones((2, 3, 3, 64)), jnp.ones((2, 2), jnp.int32)
    table = explain(loss_fn, params, *batch)
    rules = {row.name[2:-2]: row.rule for row in table.rows}
    assert rules == {
        "table": "one-hot", "kernel": "patches", "late": "patches + gram", "recurrent": "gram", "once": "outer",
        "offset": "formed", "long": "formed", "unused": "zero",
    }  # fmt: skip
    by_name = {row.name[2:-2]: row for row in table.rows}
    assert {name: row.shape for name, row in by_name.items()} == shapes
    assert (by_name["once"].uses, by_name["once"].left, by_name["once"].right) == ("1", 4, 5)
    assert (by_name["recurrent"].uses, by_name["kernel"].uses) == ("2", "64")
    assert by_name["late"].flops < by_name["late"].formed_flops
    assert by_name["kernel"].flops == by_name["kernel"].formed_flops
    assert table.total.flops == sum(row.flops for row in table.rows)
    lines = str(table).splitlines()
    assert len({len(line) for line in lines[1 : len(shapes) + 1]}) == 1 and lines[len(shapes) + 1].startswith("all ")


def test_parts_of_a_concatenated_matrix_have_factors():
    """Red if the gates of flax's OptimizedLSTMCell are formed again, at every step: that takes 2.5 plain steps."""
    network = nn.RNN(nn.OptimizedLSTMCell(32))
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.ones((2, 32)))
    rows = explain(lambda p, x: jnp.sum(network.apply(p, x)), params, jnp.ones((3, 2, 32))).rows
    assert {row.rule for row in rows if "kernel" in row.name} == {"gram"}


def test_the_text_ends_with_what_is_saved_and_a_legend():
    """Red if the share is that which remains, or a rule of the table is not explained, or another is."""
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4), "kernel": jnp.ones((2, 1, 1))}

    def loss_fn(p, x):
        windows = jax.lax.conv_general_dilated(
            x[None, :, None], p["kernel"], (1,), "VALID", None, None, ("NWC", "WIO", "NWC")
        )
        return jnp.sum(jnp.tanh(x @ p["w"] + p["b"])) + jnp.sum(windows)

    table = explain(loss_fn, params, jnp.ones((16, 8)))
    saved, columns, *legend = str(table).splitlines()[len(params) + 2 :]
    share = 1 - sum(row.flops for row in table.rows) / sum(row.formed_flops for row in table.rows)
    assert saved.startswith(f"flops saved: {100 * share:.0f} % of") and columns.startswith("T uses of I × J")
    occurring = {part for row in table.rows for part in row.rule.split(" + ")}
    assert {line.split(":")[0] for line in legend} == occurring and {"outer", "formed"} < occurring


def test_explain_computes_nothing():
    loss_fn, params, images, labels = model_problem("mlp", 2)
    shapes = jax.eval_shape(lambda: (params, images, labels))
    assert {row.rule for row in explain(loss_fn, *shapes).rows} == {"outer", "formed"}

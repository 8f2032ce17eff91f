"""Functions that several test files use: runs of seconds, what they leave behind, comparisons."""

import os
import pathlib
import shutil

import numpy as np
from ml_collections import ConfigDict

from experiments.configs import digits
from issgd_jax import ScoreStore
from issgd_jax.run import checkpoint

SVHN = pathlib.Path(__file__).parents[2] / "shared" / "tfds"


def soak(quick, whole):
    """Returns `whole` where the environment has ISSGD_SOAK=1 (`make soak`), else `quick`."""
    return whole if os.environ.get("ISSGD_SOAK") == "1" else quick


def soak_seed():
    """Returns a fixed seed; in `make soak` that of ISSGD_SOAK_SEED, which pytest prints."""
    return soak(0, int(os.environ.get("ISSGD_SOAK_SEED", "0")))


def smoke(**overrides) -> ConfigDict:
    config = digits.get_config("smoke")
    config.log.progress = False
    config.log.tensorboard = False
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def without_time(history):
    return [
        {k: v for k, v in row.items() if k not in ("wall_seconds", "step_seconds", "memory/resident_bytes")}
        for row in history
    ]


def scores(workdir):
    store = ScoreStore.load(workdir / "scores.npz")
    return np.asarray(store.score), np.asarray(store.scored_at)


def read_events(path):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    values = {}
    for raw in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(raw)
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def small(**overrides):
    """A run of a second: checkpoints every 7 steps, none of which a row, a round or a renewal begins with."""
    fixed = {
        "steps": 40,
        "eval_every": 10,
        "model__mlp__hidden_sizes": (16,),
        "checkpoint__every_steps": 7,
        "checkpoint__keep": 100,
    }
    return smoke(**fixed | overrides)


def steps_of(workdir):
    return sorted(int(path.name.removeprefix("step_")) for path in (workdir / "checkpoints").glob("step_*"))


def path_of(workdir, step):
    return workdir / "checkpoints" / f"step_{step:010d}"


def rewind(workdir, step):
    """As if the run had been killed after it had made the checkpoint of this step."""
    for later in steps_of(workdir):
        if later > step:
            shutil.rmtree(path_of(workdir, later))


def arrays_of(workdir, step):
    return checkpoint.read(path_of(workdir, step)).arrays


def check_same(workdir, step, expected):
    found = arrays_of(workdir, step)
    assert found.keys() == expected.keys() and any(name.startswith("train_state.params") for name in found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def check_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(without_time(found), without_time(expected), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if b[name] is None:
                assert a[name] is None, name
            else:
                np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-6, err_msg=name)

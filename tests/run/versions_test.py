"""What a run leaves behind on one version of JAX is read on the others.

`python -m tests.run.versions_test` writes a folder for the installed version, to be committed.
"""

import pathlib
import shutil

import jax
import numpy as np
import pytest

import issgd_jax
from issgd_jax.run.metrics import read_metrics
from tests.helpers import check_close, small, without_time

FOLDER = pathlib.Path(__file__).parent / "written"
KEPT = ("checkpoints", "config.json", "metrics.jsonl", "scores.npz")


def config(steps):
    return small(
        steps=steps,
        eval_every=4,
        checkpoint__every_steps=8,
        checkpoint__keep=1,
        model__mlp__hidden_sizes=(4,),
        data__train_split="train[:60]",
        data__test_split="test[:20]",
        workers__chunk_size=10,
        learner__batch_size=8,
        learner__draw="systematic",  # as the folders were written, when it was the default
    )


@pytest.mark.parametrize("written", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_run_of_another_version_goes_on(written, tmp_path):
    """Red if a checkpoint, scores or rows of another version are refused, lost or read as something else."""
    workdir = tmp_path / "run"
    shutil.copytree(written, workdir)
    store = issgd_jax.ScoreStore.load(workdir / "scores.npz")
    assert store.score.shape == (60,) and np.isfinite(store.score).all() and np.max(store.scored_at) < 8
    history = issgd_jax.train(config(steps=16), workdir)
    rows = without_time(read_metrics(written / "metrics.jsonl"))
    assert without_time(history)[:2] == rows[:2]  # that of the checkpoint's own step is measured again
    whole = issgd_jax.train(config(steps=16), tmp_path / "whole")
    assert history[-1].keys() == whole[-1].keys()
    # Earlier versions did not count draws: they are counted from the checkpoint on.
    for folder, steps in ((workdir, 8), (tmp_path / "whole", 16)):
        with np.load(folder / "scores.npz") as arrays:
            assert arrays["times_drawn"].sum() == 8 * steps
    check_close(
        *([{name: row[name] for name in rows[0]} for row in run] for run in map(without_time, (history, whole)))
    )


def write():
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    workdir = FOLDER / f"jax-{jax.__version__}"
    issgd_jax.train(config(steps=8), workdir)
    for path in workdir.iterdir():
        if path.name not in KEPT:
            path.unlink()


if __name__ == "__main__":
    write()

"""Folders of runs, written without training."""

import json
import os
import socket
import time

import numpy as np

from issgd_jax.config import digits
from issgd_jax.run import checkpoint
from issgd_jax.sampling import ScoreStore


def row(step, **values):
    return {
        "step": step,
        "wall_seconds": step / 10,
        "worker_examples": 20 * step,
        "train/loss": 2.0 / (1 + step),
        "train/error": 0.0,
        "test/error": 0.5,
        "variance/gain": 1.5,
    } | values


def write_run(folder, *, steps=(0, 10, 20), of=20, alive=True, **values):
    """Writes the files of a run that is at the last of `steps`, of this process, or of one that is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = digits.get_config()
    config.steps = of
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step, **values)) + "\n" for step in steps))
    beat = {"step": steps[-1] if steps else 0, "at": time.time() - (0 if alive else 100), "host": socket.gethostname()}
    (folder / "heartbeat.json").write_text(json.dumps(beat | {"process": os.getpid() if alive else -1}))
    return folder


def write_scores(folder, score, scored_at, **others):
    store = ScoreStore(np.asarray(score, np.float32), np.asarray(scored_at, np.int32))
    store.save(folder / "scores.npz", **others)


def write_checkpoint(folder, step, score, scored_at):
    arrays = {
        "sampler_state.score": np.asarray(score, np.float32),
        "sampler_state.scored_at": np.asarray(scored_at, np.int32),
    }
    (folder / "checkpoints").mkdir(exist_ok=True)
    path = checkpoint.path_of(folder / "checkpoints", step)
    checkpoint.write(path, checkpoint.Checkpoint(arrays, {"step": step}))

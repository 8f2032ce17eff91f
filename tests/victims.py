"""What runs in the processes that tests kill. Each comes from a server that has the imports, but no JAX backend yet."""

import atexit
import json
import multiprocessing
import os
import sys

import jax

from issgd_jax.run import loop, training
from tests.helpers import smoke

_PRELOADED = ["tests.victims", "orbax.checkpoint", "sklearn.datasets", "tensorboardX.record_writer"]


def config(**overrides):
    """Two seconds, with a checkpoint being written nearly all the time and rounds in flight."""
    fixed = {
        "steps": 200,
        "eval_every": 10,
        "model__mlp__hidden_sizes": (16,),
        "schedule__score_delay": 9,
        "checkpoint__every_steps": 7,
        "checkpoint__keep": 2,
        "log__tensorboard": True,
    }
    return smoke(**fixed | overrides)


def server():
    """A context whose processes start within a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def train(workdir, begun, overrides):
    """Trains; sets the event `begun` when all is compiled or restored, and the first step is to come."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    # Reads compiled programs that others wrote, and leaves none half written.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    run = loop.run

    def run_and_tell(*arguments, **keywords):
        begun.set()
        return run(*arguments, **keywords)

    loop.run = run_and_tell
    training.train(config(**overrides), workdir)


def start_command(arguments, log, without=()):
    """Starts the program with these arguments, and without these variables in its environment; returns the process."""
    process = server().Process(target=command, args=(arguments, log, without))
    process.start()
    return process


def command(arguments, log, without=()):
    """The program with these arguments, its output in a file; beside that the history that it returns."""
    for name in without:
        os.environ.pop(name, None)
    jax.config.update("jax_platforms", "cpu")
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from issgd_jax import main  # defines the program's flags, which the processes of tests must not have

    train = training.train

    def train_and_keep(*arguments, **keywords):
        history = train(*arguments, **keywords)
        log.with_suffix(".json").write_text(json.dumps(history))

    training.train = train_and_keep
    sys.argv = ["issgd_jax.main", *arguments]
    try:
        main.run()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out

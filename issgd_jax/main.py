"""Trains one experiment: python -m issgd_jax.main --config=experiments/configs/digits.py --workdir=runs/digits.

The same command goes on with a run that was stopped.
"""

import difflib
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from issgd_jax import config as config_lib
from issgd_jax.errors import BadScoreError, InputError, NonFiniteLossError, ProcessLostError, StoppedError

_MENDABLE = (InputError, NonFiniteLossError, BadScoreError, ProcessLostError)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; any field: --config.a.b=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for metrics, events and config of the run.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a run that workdir holds; without, it goes on.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which backends it did not find
    if not _WORKDIR.value:
        raise InputError("--workdir is empty: name a folder for the run")
    from issgd_jax.run.training import train  # JAX and flax load only once the flags are right

    try:
        train(_CONFIG.value, _WORKDIR.value, overwrite=_OVERWRITE.value)
    except Exception as error:
        if _CONFIG.value.distributed.coordinator and not isinstance(error, StoppedError):
            _leave(error)
        raise


def _leave(error: Exception) -> None:
    """Ends this process of several without waiting for the others."""
    from issgd_jax import processes

    print(f"error: {error}", file=sys.stderr) if isinstance(error, _MENDABLE) else traceback.print_exc()
    processes.leave(1)


def parse_flags(argv):
    """absl's parser, after a check of the `--config` arguments that gives the nearest names."""
    for argument in argv[1:]:
        if match := re.match(r"--?config=([^:]*)", argument):
            _check_file(pathlib.Path(match[1]))
        elif match := re.match(r"--?config\.([^=]+)", argument):
            config_lib.check_field(match[1])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise InputError(error) from error


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [f.name for f in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "see experiments/configs"
        raise InputError(f"config file {path} does not exist: {hint}")


def run(program=main):
    """Entry point: errors that a person can mend are one line, all others keep their traceback."""
    try:
        app.run(program, flags_parser=parse_flags)
    except _MENDABLE as error:
        sys.exit(f"error: {error}")
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal)  # as a shell tells of a program that a signal ended


if __name__ == "__main__":
    run()

"""Trains one experiment, or resumes a run that was stopped.

    issgd-jax train --workdir=runs/digits [--config=FILE.py] [--config.FIELD=VALUE ...]

`python -m issgd_jax.main` is the same program.
"""

import difflib
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from issgd_jax import config as config_lib
from issgd_jax.config import digits, parsers
from issgd_jax.config.page import help_text
from issgd_jax.errors import BadScoreError, InputError, NonFiniteLossError, ProcessLostError, StoppedError
from issgd_jax.extras import MissingExtraError
from issgd_jax.interrupts import ending_at_interrupt
from issgd_jax.paths import local_path, print_any_name

parsers.register()
_USER_ERRORS = (InputError, MissingExtraError, NonFiniteLossError, BadScoreError, ProcessLostError)
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment file, Python that is EXECUTED; FILE.py:smoke is a run of seconds. Without it: digits.",
    lock_config=True,
)
_WORKDIR = parsers.define_optional("workdir", str, "Folder of this machine for metrics, events and config of the run.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the run in workdir; without it, that run is resumed.")


def main(argv: list[str]) -> None:
    """Trains the experiment of the flags.

    Args:
      argv: the program's name; anything after it is an error.

    Raises:
      InputError: a flag or a value cannot work.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
    logging.set_verbosity(logging.WARNING)  # at INFO, JAX logs the backends that are missing
    folder = workdir()
    from issgd_jax.run.training import train  # loads JAX and flax: only after the flags are checked

    try:
        train(_CONFIG.value, folder, overwrite=_OVERWRITE.value)
    except Exception as error:
        if _CONFIG.value.distributed.coordinator and not isinstance(error, StoppedError):
            _leave(error)
        raise


def workdir() -> pathlib.Path:
    """Returns the folder of the flag --workdir; raises InputError if it is missing, or no folder of this machine."""
    if not _WORKDIR.value:
        raise InputError("--workdir is empty: name a folder for the run, as in --workdir=runs/digits")
    return local_path(_WORKDIR.value, "--workdir")


def _leave(error: Exception) -> None:
    """Ends this process without waiting for the others of a distributed run."""
    from issgd_jax import processes

    print(f"error: {error}", file=sys.stderr) if isinstance(error, _USER_ERRORS) else traceback.print_exc()
    processes.leave(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; checks the `--config` arguments first, to name the nearest file or field.

    Without `--config=FILE.py`, the experiment is digits.

    Returns:
      Arguments that are not flags.

    Raises:
      InputError: a flag, a file or a field does not exist, or a value has another type.
    """
    try:
        program, *arguments = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        arguments = _with_one_config(arguments)
        for argument in arguments:
            if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
                config_lib.check_field(match[1])
        return flags.FLAGS([program, *arguments])
    except flags.Error as error:
        raise InputError(error) from error


def _with_one_config(arguments: list[str]) -> list[str]:
    """Returns arguments that begin with the last `--config=FILE.py` of them, or that of digits; checks that file."""
    config, others, words = digits.__file__, [], iter(arguments)
    for word in words:
        if word == "--":
            others += [word, *words]
        elif match := re.fullmatch(r"--?config(?:=(.*))?", word, flags=re.DOTALL):
            config = _find_file(next(words, "") if match[1] is None else match[1])
        else:
            others.append(word)
    return [f"--config={config}", *others]


def _find_file(argument: str) -> str:
    """Returns `FILE.py:options` with `~` expanded; raises InputError if there is no such file."""
    path = local_path(argument, "--config")
    if ":" in str(path) and path.is_file():
        raise InputError(f"config file {path} has a colon in its name, after which options begin: rename it")
    file, *options = str(path).split(":", 1)
    _check_file(pathlib.Path(file))
    return ":".join([file, *options])


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [f.name for f in path.parent.glob("*.py")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "see experiments/configs"
        raise InputError(f"config file {path} does not exist: {hint}")


def run(program: Callable[[list[str]], None] = main) -> None:
    """Runs a program with these flags, and exits with its status.

    Errors that the user can correct are printed as one line; all others keep their traceback.
    """
    print_any_name()
    if {"--help", "-help", "-h"} & {*sys.argv[1:]}:
        print(_help(sys.modules[program.__module__]))
        sys.exit()
    try:
        with ending_at_interrupt():
            app.run(program, flags_parser=parse_flags)
    except _USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal)  # a shell's status for an end by signal


def _help(module: types.ModuleType) -> str:
    """Returns what a program does, its flags, and the fields of its config."""
    own = [f"--{flag.name}: {flag.help}" for flag in flags.FLAGS.get_key_flags_for_module(module)]
    return "\n".join([module.__doc__, "Flags", *own, "", "Fields of the experiment, with their defaults", help_text()])


if __name__ == "__main__":
    run()

"""Trains one experiment, or resumes a run that was stopped.

    issgd-jax train --workdir=runs/digits [--config=FILE.py] [--config.FIELD=VALUE ...]

`python -m issgd_jax.main` is the same program.
"""

import ast
import difflib
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

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
# Fields that a problem with an optimizer of its own replaces.
_OF_OPTIMIZER = (
    "learner.optimizer", "learner.learning_rate", "learner.lr_schedule", "learner.momentum", "learner.nesterov",
    "learner.rate_by_gain",
)  # fmt: skip
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
        train(experiment(), folder, overwrite=_OVERWRITE.value)
    except Exception as error:
        if _CONFIG.value.distributed.coordinator and not isinstance(error, StoppedError):
            _leave(error)
        raise


def experiment() -> ConfigDict:
    """Returns the config of the flags; raises InputError for a field given there that has no effect."""
    config, given = _CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
    if config.problem is None:
        return config
    without = [name for name in given if name.startswith(("data.", "model."))]
    of_optimizer = [name for name in given if name in _OF_OPTIMIZER]
    if of_optimizer:
        from issgd_jax.task.problem import import_problem  # loads JAX

        without += of_optimizer if import_problem(config.problem).optimizer is not None else []
    if without:
        raise InputError(
            f"--config.{without[0]} has no effect: the problem {config.problem} has its own. Leave it out, or change "
            "it in the problem"
        )
    return config


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
        rest = flags.FLAGS([program, *arguments])
    except flags.Error as error:
        raise InputError(error) from error
    if not isinstance(_CONFIG.value, ConfigDict):
        raise InputError(f"get_config of {arguments[0].partition('=')[2]} returned {_CONFIG.value!r}, no ConfigDict")
    return rest


def _with_one_config(arguments: list[str]) -> list[str]:
    """Returns arguments that begin with the last `--config=FILE.py` of them, or that of digits; checks the files."""
    config, others, words = digits.__file__, [], iter(arguments)
    for word in words:
        if word == "--":
            others += [word, *words]
        elif match := re.fullmatch(r"--?config(?:=(.*))?", word, flags=re.DOTALL):
            config = _find_file(next(words, "") if match[1] is None else match[1])
        else:
            others.append(word)
    _check_function(config)
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


def _check_function(config: str) -> None:
    """Raises InputError unless `FILE.py:options` has a function `get_config`, which takes options if there are any."""
    path, _, options = config.partition(":")
    try:
        body = ast.parse(pathlib.Path(path).read_bytes()).body
    except (SyntaxError, ValueError):  # executing it tells where
        return
    functions = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    named = functions.keys() | {name.id for node in body for name in ast.walk(node) if isinstance(name, ast.Name)}
    named |= {a.asname or a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names}
    if "get_config" not in named:
        raise InputError(f"config file {path} has no function get_config: see experiments/configs")
    if options and "get_config" in functions:
        arguments = functions["get_config"]
        if not (arguments.posonlyargs or arguments.args or arguments.vararg):
            raise InputError(f"get_config of {path} takes no options: leave out what follows the colon")


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
    title = "Fields of the experiment, with their values where no --config=FILE.py is given (digits)"
    values = config_lib.flatten(digits.get_config())
    return "\n".join([module.__doc__, "Flags", *own, "", title, help_text(values)])


if __name__ == "__main__":
    run()

"""Flags and entry point of the study's commands. Imports no jax."""

import pathlib
import sys

from absl import app, flags, logging

from experiments.paper import results, studies
from experiments.paper.study import DATA
from issgd_jax.config import parsers
from issgd_jax.errors import InputError, StoppedError
from issgd_jax.interrupts import ending_at_interrupt
from issgd_jax.paths import local_path, print_any_name

# Of their own, so that a process may import these commands beside the training program.
FLAGS = flags.FlagValues()
_STUDY = flags.DEFINE_string("study", None, f"One of {', '.join(studies.STUDIES)}.", flag_values=FLAGS)
_DATA = flags.DEFINE_string("data", "fashion_mnist", f"One of {', '.join(DATA)}.", flag_values=FLAGS)
_WORKDIR = parsers.define_optional(
    "workdir", str, "Folder of all runs; figures and tables: None = the saved results.", FLAGS
)
_ARMS = flags.DEFINE_list("arms", [], "Only these arms.", flag_values=FLAGS)
_SEEDS = parsers.define_optional(
    "seeds", int, "Number of seeds 0, 1, ... of each arm; None: 10 to sweep, else all that are finished.", FLAGS
)
_DATA_DIR = parsers.define_optional("data_dir", str, "TFDS folder of the data; None: TFDS's default.", FLAGS)
_WIDTH = parsers.define_optional("width", int, "Width of the MLP's four hidden layers; None: the study's.", FLAGS)
_STEPS = parsers.define_optional("steps", int, "Learner steps; None: the study's.", FLAGS)
flags.mark_flag_as_required("study", flag_values=FLAGS)
# Flags that only train, or time.
OF_RUNS = ("data_dir", "width", "steps")


def overrides() -> dict:
    """Returns {config field: value} that the flags override in every arm."""
    changed = {"data.dir": _DATA_DIR.value}
    if _WIDTH.value is not None:
        changed["model.mlp.hidden_sizes"] = (_WIDTH.value,) * 4
    if _STEPS.value is not None:
        changed["steps"] = _STEPS.value
    return changed


def workdir() -> pathlib.Path | None:
    """Returns the folder of the flag --workdir; None if there is none; InputError if it is no local one."""
    return None if _WORKDIR.value is None else local_path(_WORKDIR.value, "--workdir")


def record() -> dict:
    """Returns the results that the flags select: those saved, or a summary of a workdir, which is saved if complete.

    A summary of another experiment than the saved results, such as a trial of fewer steps, does not replace them.

    Raises:
      InputError: an unknown study, data set or arm, no results, or --seeds without --workdir.
    """
    study = studies.get_study(_STUDY.value)
    arms = study.with_baselines(_ARMS.value)
    study.choose_arms(_DATA.value, arms)
    folder = workdir()
    if folder is None:
        if _SEEDS.value is not None:
            raise InputError(f"--seeds={_SEEDS.value} needs the --workdir of a sweep: saved results are of all seeds")
        saved = results.load(_STUDY.value, _DATA.value)
        if missing := [name for name in arms if name not in saved["arms"]]:
            raise InputError(f"the saved results have no arm {missing[0]}, only {', '.join(saved['arms'])}")
        return saved | {"arms": {name: arm for name, arm in saved["arms"].items() if not arms or name in arms}}
    summary = results.summarize(
        folder,
        _STUDY.value,
        _DATA.value,
        arms=arms,
        seeds=None if _SEEDS.value is None else range(_SEEDS.value),
    )
    if not results.is_as_saved(summary):
        print("not saved: the saved results are of another network, or of more or fewer steps", file=sys.stderr)
    elif not arms and _SEEDS.value is None:
        print(f"saved in {results.save(summary)}", file=sys.stderr)
        return results.load(_STUDY.value, _DATA.value)
    return summary


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; returns the arguments that are none."""
    if {"--help", "-h"} & set(argv):
        print(sys.modules["__main__"].__doc__, FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        remaining = FLAGS(argv)
    except flags.Error as error:
        raise InputError(error) from error
    flags.FLAGS.mark_as_parsed()  # absl's own: their defaults serve
    return remaining


def run(program, *, without: tuple[str, ...] = ()) -> None:
    """Runs `program()` as a command; an InputError is printed as one line, and so is a signal that ends it.

    Args:
      program: function without arguments.
      without: names of flags that have no effect there, and are refused.
    """

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
        if useless := [name for name in without if FLAGS[name].present]:
            raise InputError(f"--{useless[0]} has no effect on this command: leave it out")
        logging.set_verbosity(logging.WARNING)  # JAX logs missing backends at INFO
        program()

    print_any_name()
    try:
        with ending_at_interrupt():
            app.run(main, flags_parser=_parse)
    except InputError as error:
        sys.exit(f"error: {error}")
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal)

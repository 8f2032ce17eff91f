"""Flags and entry point of the study's commands. Imports no jax."""

import pathlib
import sys

from absl import app, flags, logging

from experiments.paper import results, studies
from issgd_jax.errors import InputError

# Of their own, so that a process may import these commands beside the training program.
FLAGS = flags.FlagValues()
_STUDY = flags.DEFINE_string("study", None, f"One of {', '.join(studies.STUDIES)}.", flag_values=FLAGS)
_DATA = flags.DEFINE_string("data", "fashion_mnist", f"One of {', '.join(studies.DATA)}.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all runs; figures and tables: none = the saved results.", flag_values=FLAGS
)
_ARMS = flags.DEFINE_list("arms", [], "Only these arms.", flag_values=FLAGS)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Number of seeds 0, 1, ... of each arm; none: 10 to sweep, else all that are finished.",
    flag_values=FLAGS,
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder of the data; none: TFDS's default.", flag_values=FLAGS)
_WIDTH = flags.DEFINE_integer(
    "width", None, "Width of the MLP's four hidden layers; none: the study's.", flag_values=FLAGS
)
_STEPS = flags.DEFINE_integer("steps", None, "Learner steps; none: the study's.", flag_values=FLAGS)
flags.mark_flag_as_required("study", flag_values=FLAGS)


def overrides() -> dict:
    """Returns {config field: value} that the flags override in every arm."""
    changed = {"data.dir": _DATA_DIR.value}
    if _WIDTH.value is not None:
        changed["model.mlp.hidden_sizes"] = (_WIDTH.value,) * 4
    if _STEPS.value is not None:
        changed["steps"] = _STEPS.value
    return changed


def record() -> dict:
    """Returns the results that the flags select: those saved, or a summary of a workdir, which is saved if complete.

    Raises:
      InputError: an unknown study, data set or arm, no results, or --seeds without --workdir.
    """
    study = studies.get_study(_STUDY.value)
    arms = studies.with_baselines(study, _ARMS.value)
    studies.choose_arms(study, _DATA.value, arms)
    if _WORKDIR.value is None:
        if _SEEDS.value is not None:
            raise InputError(f"--seeds={_SEEDS.value} needs the --workdir of a sweep: saved results are of all seeds")
        saved = results.load(_STUDY.value, _DATA.value)
        if missing := [name for name in arms if name not in saved["arms"]]:
            raise InputError(f"the saved results have no arm {missing[0]}, only {', '.join(saved['arms'])}")
        return saved | {"arms": {name: arm for name, arm in saved["arms"].items() if not arms or name in arms}}
    summary = results.summarize(
        pathlib.Path(_WORKDIR.value),
        _STUDY.value,
        _DATA.value,
        arms=arms,
        seeds=None if _SEEDS.value is None else range(_SEEDS.value),
    )
    if not arms and _SEEDS.value is None:
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


def run(program) -> None:
    """Runs `program()` as a command; an InputError is printed as one line."""

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments {argv[1:]}; options begin with --")
        logging.set_verbosity(logging.WARNING)  # JAX logs missing backends at INFO
        program()

    try:
        app.run(main, flags_parser=_parse)
    except InputError as error:
        sys.exit(f"error: {error}")

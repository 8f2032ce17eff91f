"""Command line: `issgd-jax COMMAND ...`, also `python -m issgd_jax COMMAND ...`."""

import argparse
import difflib
import os
import pathlib
import signal
import sys

import issgd_jax
from issgd_jax.errors import InputError
from issgd_jax.extras import MissingExtraError, check_extra
from issgd_jax.interrupts import ending_at_interrupt
from issgd_jax.paths import local_path, print_any_name

_USAGE = """\
usage: issgd-jax COMMAND [ARGUMENTS]

commands:
  train      train an experiment in a folder, or resume the run that is there
  compare    train with importance sampling and without, and print both side by side
  potential  measure what importance sampling could gain, before it is adopted
  plot       draw loss, error and noise of runs, finished or running
  status     print how far a run is, its last measurement, and its workers
  watch      follow runs in the terminal: curves, rates, workers, time left
  report     write one HTML page about runs: whether the method helped, curves, scores, examples
  hardest    print, and draw, the examples with the largest scores: hints for wrong labels

examples:
  issgd-jax train --workdir=runs/digits
  issgd-jax train --workdir=runs/mine --config=FILE.py --config.learner.learning_rate=0.02
  issgd-jax plot runs/digits runs/mine

`issgd-jax COMMAND --help` prints the arguments of a command, `issgd-jax --version` the version."""


def main() -> None:
    """Runs the command that the arguments name; errors that the user can correct are printed as one line."""
    with ending_at_interrupt():
        try:
            _main(*(sys.argv[1:] or ["--help"]))
            sys.stdout.flush()
        except BrokenPipeError:  # as `| head` leaves it, which has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def _main(command: str, *arguments: str) -> None:
    print_any_name()
    if command in ("--help", "-h", "help"):
        print(_USAGE)
    elif command == "--version":
        print(issgd_jax.__version__)
    else:
        try:
            _run(command, [*arguments])
        except (InputError, MissingExtraError) as error:
            sys.exit(f"error: {error}")


def _run(command: str, arguments: list[str]) -> None:
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(_COMMANDS)}"
        raise InputError(f"issgd-jax has no command {command!r}: {hint}")
    check_extra(f"issgd-jax {command}", "flax")
    sys.argv = [f"issgd-jax {command}", *arguments]  # where the flags of a config are read from
    _COMMANDS[command]()


def _train() -> None:
    from issgd_jax import main as program

    program.run()


def _compare() -> None:
    from issgd_jax import compare
    from issgd_jax import main as program

    program.run(compare.main)


def _potential() -> None:
    from issgd_jax import main as program
    from issgd_jax import prospect

    program.run(prospect.main)


def _plot() -> None:
    """Writes a figure of the runs that the arguments name."""
    from issgd_jax import plots
    from issgd_jax.run.metrics import read_run

    parser = argparse.ArgumentParser(sys.argv[0], description="Draws loss, error and noise over steps and seconds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or running")
    parser.add_argument("-o", "--output", default="runs.png", help="picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    runs, output = [local_path(run, "RUN") for run in arguments.runs], local_path(arguments.output, "--output")
    names = [run.resolve().name for run in runs]
    labels = names if len({*names}) == len(names) else arguments.runs
    figure = plots.runs_figure(dict(zip(labels, map(read_run, runs))))
    _save(figure, output, "--output")
    print(output)


def _save(figure, path: pathlib.Path, flag: str) -> None:
    """Writes a figure; raises InputError if it cannot, naming the flag where its value is no picture's name."""
    from issgd_jax import plots

    try:
        plots.save(figure, path)
    except ValueError as error:  # of an ending that is no format
        raise InputError(f"{flag}={path} cannot be written: {error}") from error


def _status() -> None:
    from issgd_jax.run import status

    parser = argparse.ArgumentParser(sys.argv[0], description="Prints how far a run is, its measurements, its workers.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, finished or running")
    print(status.read(parser.parse_args().run))


def _watch() -> None:
    from issgd_jax.view import watch

    parser = argparse.ArgumentParser(sys.argv[0], description="Follows runs in the terminal until all are finished.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which may start later")
    parser.add_argument("--once", action="store_true", help="print them once; so where the output is no terminal")
    parser.add_argument("--seconds", type=float, default=1.0, help="between two looks (default: %(default)s)")
    arguments = parser.parse_args()
    watch.watch(arguments.runs, once=arguments.once, seconds=arguments.seconds)


def _report() -> None:
    import jax

    from issgd_jax.view import report

    parser = argparse.ArgumentParser(sys.argv[0], description="Writes one HTML page about runs, which loads nothing.")
    parser.add_argument(
        "workdirs", nargs="+", metavar="WORKDIR", help="folder of a run, finished or running, or of several runs"
    )
    parser.add_argument("-o", "--output", default=report.FILE, help="page to write (default: %(default)s)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be a run's
    print(report.report(arguments.workdirs, arguments.output))


def _hardest() -> None:
    """Prints the examples with the largest scores, and draws them where a file is named."""
    import jax

    from issgd_jax.view import hardest

    parser = argparse.ArgumentParser(sys.argv[0], description="Prints the examples of a run with the largest scores.")
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--k", type=int, default=50, help="number of examples (default: %(default)s)")
    parser.add_argument(
        "--by",
        choices=(hardest.LAST, hardest.MEAN),
        default=hardest.LAST,
        help="scores at the end, or their mean over the checkpoints, which finds wrong labels better",
    )
    parser.add_argument("--images", metavar="FILE", help="picture of the examples to write")
    parser.add_argument("--data_dir", help="TFDS folder of the data, where it is not that of the run")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be a run's
    found = hardest.hardest(arguments.run, arguments.k, by=arguments.by, data_dir=arguments.data_dir)
    print(found)
    if arguments.images is not None:
        output = local_path(arguments.images, "--images")
        _save(hardest.grid(found), output, "--images")
        print(output)


_COMMANDS = {
    "train": _train,
    "compare": _compare,
    "potential": _potential,
    "plot": _plot,
    "status": _status,
    "watch": _watch,
    "report": _report,
    "hardest": _hardest,
}

if __name__ == "__main__":
    main()

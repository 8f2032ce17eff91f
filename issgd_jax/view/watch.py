"""Follows runs in a terminal, from the files in their folders. Imports no jax, and changes nothing."""

import functools
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live

from issgd_jax.errors import InputError
from issgd_jax.interrupts import raising_at_interrupt
from issgd_jax.paths import local_path
from issgd_jax.run import workdir
from issgd_jax.view import panel
from issgd_jax.view.glance import Glance, look
from issgd_jax.view.tail import Tail

# Heights of the curves of losses, the one that fits is taken.
_HEIGHTS = (4, 3, 2, 1)


def watch(
    runs: Sequence[str | pathlib.Path], *, once: bool = False, seconds: float = 1.0, console: Console | None = None
) -> None:
    """Shows runs in the terminal until all are finished; a run may start, stop, resume or be removed meanwhile.

    Args:
      runs: folders of runs, or of folders of runs.
      once: whether to show them once, as they are; also where the output is no terminal.
      seconds: between two looks.
      console: to print to; None: standard output.

    Raises:
      InputError: `seconds` is not above 0; a folder is none of this machine; or runs are shown once and none is there.

    Example:
      >>> watch(["runs/none"], once=True)
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run: name the --workdir of one
    """
    if not 0 < seconds <= 3600:
        raise InputError(f"seconds must be above 0 and at most 3,600, got {seconds:g}")
    folders = [local_path(run, "RUN") for run in runs]
    look_at = functools.partial(_look, folders, {})
    console = console or Console(highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal:
        if not any(workdir.holds_run(folder) for folder in workdir.runs_in(folders)):
            workdir.check_run(folders[0])
        console.print(_fit(console, look_at(), height=None))
        return
    _follow(look_at, seconds, console)


def _follow(look_at: Callable[[], list[Glance]], seconds: float, console: Console) -> None:
    """Draws again and again on a screen of its own; leaves the last picture behind."""
    glances = look_at()
    try:
        with raising_at_interrupt(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_fit(console, glances, height=console.height), refresh=True)
                if all(glance.state == "finished" for glance in glances):
                    break
                time.sleep(seconds)
                glances = look_at()
    except KeyboardInterrupt:
        console.print(_fit(console, glances, height=None))
        sys.exit(128 + signal.SIGINT)
    console.print(_fit(console, glances, height=None))


def _look(folders: list[pathlib.Path], tails: dict[pathlib.Path, Tail]) -> list[Glance]:
    """Returns what is seen of all runs in the folders now; tails: of those that were seen before."""
    found = workdir.runs_in(folders)
    return [look(run, tails.setdefault(run, Tail(run / workdir.METRICS_FILE))) for run in found]


def _fit(console: Console, glances: list[Glance], *, height: int | None) -> RenderableType:
    """Returns the fullest picture that has at most so many lines."""
    for lines in _HEIGHTS:
        picture = Group(*(panel.panel(glance, width=console.width, height=lines) for glance in glances))
        if height is None or len(console.render_lines(picture, pad=False)) <= height:
            return picture
    return picture if len(glances) == 1 else panel.overview(glances, width=console.width)

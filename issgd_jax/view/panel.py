"""A run as text for a terminal of any width, drawn by rich. Imports no jax."""

import datetime

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from issgd_jax.view.curves import curve
from issgd_jax.view.glance import Glance

_COLOURS = {"running": "green", "finished": "blue", "stopped": "red", "no run yet": "yellow"}
# Column of metrics: its name here, the form of its values, and whether its curve is of logarithms.
_CURVES = {
    "train/loss": ("train loss", "{:.4g}", True),
    "train/error": ("train error", "{:.2%}", True),
    "test/loss": ("test loss", "{:.4g}", True),
    "test/error": ("test error", "{:.2%}", True),
    "variance/gain": ("variance gain", "{:.2f}×", True),
    "variance/equivalent_batch": ("equivalent batch", "{:,.0f}", True),
    "scores/staleness_mean": ("staleness, steps", "{:,.1f}", False),
    "payoff/active": ("importance on", "{:.0f}", False),
}
_LONGEST = 1e9  # seconds; a file may hold any number
_OVERVIEW = {
    "loss": ("train/loss", "{:.3g}"),
    "error": ("test/error", "{:.1%}"),
    "gain": ("variance/gain", "{:.1f}"),
}
_STARTING = "no row of metrics yet: it compiles, or makes its first measurement"
_MISSING = "no run here yet: it is shown when it starts"
_MAX_WORKERS, _MAX_CLASSES = 8, 3
# Columns of a terminal below which values alone are shown, without those they began with.
_NARROW = 60


class Curve:
    """Curve that takes the width that its column gets."""

    def __init__(self, glance: Glance, column: str, *, height: int, log: bool):
        self._glance, self._column, self._height, self._log = glance, column, height, log

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [row for row in self._glance.rows if row.get(self._column) is not None]
        lines = curve(
            [row["step"] for row in rows],
            [row[self._column] for row in rows],
            last_step=self._glance.steps or self._glance.step,
            width=options.max_width,
            height=self._height,
            log=self._log,
            ascii_only=options.ascii_only,
        )
        yield Text("\n".join(lines), style="cyan")


def panel(glance: Glance, *, width: int, height: int = 1) -> Panel:
    """Returns one run in full.

    Args:
      glance: of the run.
      width: of the terminal; a narrow one gets less.
      height: of the curves of losses, in lines.
    """
    parts: list[RenderableType] = [_progress(glance, width)]
    parts += [Text(text, style="red") for text in (glance.failure, glance.problem) if text]
    if glance.rows:
        parts += [_curves(glance, width, height), *_facts(glance)]
    elif not glance.problem:
        parts.append(Text(_STARTING if glance.progress else _MISSING, style="dim"))
    if glance.cluster:
        parts += _cluster(glance)
    title = Text(str(glance.folder), style="bold", overflow="ellipsis", no_wrap=True)
    state = Text(_state(glance), style=_COLOURS[glance.state])
    return Panel(
        Group(*parts), title=title, title_align="left", subtitle=state, subtitle_align="right", box=box.ROUNDED
    )


def overview(glances: list[Glance], *, width: int) -> Table:
    """Returns runs in a line each, for those that do not fit in full; arguments as for `panel`."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("run", no_wrap=True, ratio=3, min_width=8)
    table.add_column("train loss", no_wrap=True, ratio=4, min_width=6)
    values = _OVERVIEW if width >= _NARROW else {}
    for name in ("done", *values, "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for glance in glances:
        row, left = glance.rows[-1] if glance.rows else {}, glance.seconds_left
        table.add_row(
            Text(glance.folder.name, style=_COLOURS[glance.state], overflow="ellipsis"),
            Curve(glance, "train/loss", height=1, log=True),
            f"{glance.step / glance.steps:.0%}" if glance.steps else "-",
            *(_value(row, column, form) for column, form in values.values()),
            _duration(left) if left is not None else glance.state,
        )
    return table


def _progress(glance: Glance, width: int) -> RenderableType:
    if not glance.steps:
        return Text(f"step {glance.step:,}" if glance.rows else "")
    rate, left = glance.rate(), glance.seconds_left
    parts = [f"{glance.step:,} of {glance.steps:,} steps"]
    if rate:
        parts.append(f"{rate:,.3g}/s" if rate < 100 else f"{rate:,.0f}/s")
    if left is not None:
        parts.append(f"{_duration(left)} left")
    elif width >= _NARROW and glance.rows and glance.rows[-1].get("wall_seconds"):
        parts.append(f"{_duration(glance.rows[-1]['wall_seconds'])} in all")
    colour = _COLOURS[glance.state]
    bar = ProgressBar(total=glance.steps, completed=glance.step, complete_style=colour, finished_style=colour)
    text = Text(", ".join(parts))
    grid = Table.grid(expand=True, padding=(0, 1))
    if width < _NARROW:
        grid.add_row(bar)
        grid.add_row(text)
    else:
        grid.add_column(ratio=1, min_width=4)
        grid.add_column(no_wrap=True)
        grid.add_row(bar, text)
    return grid


def _curves(glance: Glance, width: int, height: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True, min_width=8)
    grid.add_column(ratio=1, min_width=4)
    if width >= _NARROW:
        grid.add_column(justify="right", no_wrap=True, style="dim")
    grid.add_column(justify="left" if width >= _NARROW else "right", no_wrap=True, style="bold")
    measured = {name for row in glance.rows for name, value in row.items() if value is not None}
    # Metrics of a problem of the user's own have names of theirs.
    own = sorted(name for name in measured - _CURVES.keys() if name.startswith(("train/", "test/")))
    for column in [*(name for name in _CURVES if name in measured), *own]:
        name, form, log = _CURVES.get(column, (column.replace("/", " "), "{:.4g}", False))
        known = [row for row in glance.rows if row.get(column) is not None]
        lines = height if column.endswith("/loss") else 1
        values = [f"{_value(known[0], column, form)} to", _value(glance.rows[-1], column, form)]
        grid.add_row(name, Curve(glance, column, height=lines, log=log), *(values if width >= _NARROW else values[-1:]))
    return grid


def _facts(glance: Glance) -> list[RenderableType]:
    """Returns lines about workers, and about the decision to sample by importance."""
    row, lines = glance.rows[-1], []
    if row.get("worker_examples"):
        rate = glance.rate("worker_examples") if glance.state == "running" else None
        failed = row.get("failed_rounds") or 0
        lines.append(
            f"workers scored {row['worker_examples']:,} examples"
            + (f", {rate:,.0f}/s" if rate else "")
            + (f"; {failed:,} rounds lost" if failed else "")
        )
    if row.get("payoff/active") is not None:
        gain, cost = (_value(row, f"payoff/{name}", "{:.2f}×") for name in ("gain", "cost"))
        is_on = "on" if row["payoff/active"] else "off"
        lines.append(f"importance sampling is {is_on}: gain {gain}, cost {cost} of a uniform step")
    if glance.classes:
        largest = sorted(glance.classes, key=lambda found: -found.share)[:_MAX_CLASSES]
        lines.append(f"hardest classes: {', '.join(f'{c.label} has {c.share:.0%}' for c in largest)} of all scores")
    if row.get("skipped_updates"):
        lines.append(f"{row['skipped_updates']:,} updates were not finite and skipped")
    return [Text(line) for line in lines]


def _cluster(glance: Glance) -> list[RenderableType]:
    status = glance.cluster
    try:
        workers, seconds = status["workers"], max(status["seconds"], 1e-9)
        seconds_ago = glance.cluster_seconds
        alive = sum(bool(worker["alive"]) for worker in workers)
        head = (
            f"cluster: {alive} of {len(workers)} workers alive, {status['leases_done'] / seconds:,.1f} leases/s, "
            f"{status['leases_waiting']} waiting, {status['leases_reissued']} reissued; {seconds_ago:,.0f} s ago"
        )
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for name, justify in (
            ("worker", "left"),
            ("machine", "left"),
            ("state", "left"),
            ("leases/s", "right"),
            ("age s", "right"),
        ):
            table.add_column(name, justify=justify, no_wrap=True, header_style="dim")
        for worker in workers[:_MAX_WORKERS]:
            age = worker["seconds_since_last_result"]
            state = "alive" if worker["alive"] else "refused" if worker["problem"] else "lost"
            table.add_row(
                Text(worker["worker"]), Text(worker["machine"] or "-"), state,
                f"{worker['leases'] / seconds:,.2f}", "-" if age is None else f"{age:.1f}",
            )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        return [Text("cluster.json is malformed", style="red")]
    more = len(workers) - _MAX_WORKERS
    return [Text(head), table, *([Text(f"and {more} more", style="dim")] if more > 0 else [])]


def _state(glance: Glance) -> str:
    if glance.progress and glance.state in ("running", "stopped"):
        return f"{glance.state}, last step {_duration(glance.progress.seconds)} ago"
    return glance.state


def _value(row: dict, column: str, form: str) -> str:
    return form.format(row[column]) if row.get(column) is not None else "-"


def _duration(seconds: float) -> str:
    """Returns `8.2 s`, or h:mm:ss from a minute on."""
    return f"{seconds:,.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(min(seconds, _LONGEST))))

"""The report of runs: one HTML page that says what the method does, and whether it helped."""

import datetime
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence

from issgd_jax.errors import InputError
from issgd_jax.files import reason, write_text_atomically
from issgd_jax.history import seconds_per_step
from issgd_jax.paths import local_path
from issgd_jax.run import histograms
from issgd_jax.view import charts, gallery, origins, page
from issgd_jax.view import runs as runs_lib
from issgd_jax.view import verdict as verdict_lib
from issgd_jax.view.page import Element, tag
from issgd_jax.view.runs import IMPORTANCE, UNIFORM, Arm, Run

FILE = "report.html"
# Measures of success beside the training loss; the first that any run has is drawn.
_SECOND = ("test/error", "test/loss", "train/error")
_METHOD = (
    "Usually a training step draws its examples with equal chances. Importance sampling draws those more often from "
    "which the network still learns most: each example has a score, the norm of the gradient of its loss; the larger, "
    "the more often it is drawn, and the less each draw counts, so that the mean gradient stays what it is while its "
    "noise falls."
)


def report(workdirs: Sequence[str | pathlib.Path], output: str | pathlib.Path = FILE) -> pathlib.Path:
    """Writes a page about runs, and returns its path.

    Runs whose configs differ in their seed alone are one arm; importance sampling is compared with uniform draws.

    Args:
      workdirs: folders of runs, finished or not, or folders of such folders; at least one.
      output: file to write.

    Guarantees:
      The page loads nothing and executes nothing of a run; every text of a run is escaped. Nothing else is written.

    Raises:
      InputError: a folder holds no run, or one without rows of metrics; a row before the last is malformed; the output
        cannot be written.
      MissingExtraError: the library of charts is not installed.

    Example:
      >>> report(["runs/none"])
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run (no metrics.jsonl): name the --workdir of one
    """
    page.check()
    path = local_path(output, "--output")
    text = _Report(runs_lib.read(workdirs)).text()
    try:
        write_text_atomically(path.absolute(), text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}): choose another --output") from error
    return path


class _Report:
    """Sections of the page, and the charts that they need."""

    def __init__(self, runs: list[Run]):
        self._runs, self._arms = runs, runs_lib.arms(runs)
        self._charts: dict[str, dict] = {}

    def text(self) -> str:
        """Returns the page."""
        sections = {
            "Did it help?": self._verdict,
            "Loss and error": self._curves,
            "Noise of the gradient": self._noise,
            "Scores over time": self._heat,
            "Examples and classes": self._examples,
            "Runs": self._table,
            "Differences, environment, commands": lambda: origins.origins(self._runs, self._arms),
        }
        names = {title: f"section-{place}" for place, title in enumerate(sections, start=1)}
        links = [tag("li", tag("a", title, href=f"#{name}")) for title, name in names.items()]
        number = f"{len(self._runs)} runs" if len(self._runs) > 1 else "one run"
        title = f"Importance sampling{self._task()}: report on {number}"
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        body = [
            tag("a", "Skip to the content", href="#content", class_="skip"),
            tag("header", tag("h1", title), tag("p", _METHOD), tag("p", f"Written {now}.", class_="soft")),
            tag("nav", tag("ul", *links), aria_label="Sections"),
            tag(
                "main",
                *(
                    tag("section", tag("h2", title, id=names[title]), *make(), aria_labelledby=names[title])
                    for title, make in sections.items()
                ),
                id="content",
            ),
        ]
        return page.document(title, body, self._charts)

    def _task(self) -> str:
        """Returns what all runs learn; nothing where they differ or it is not known."""
        tasks = {run.config.get("problem") or run.config.get("data.name") for run in self._runs}
        return f" on {tasks.pop()}" if len(tasks) == 1 and None not in tasks else ""

    def _figure(self, chart: dict | None, title: str, says: str) -> Iterator[Element]:
        """Yields a chart with its title, and sentences with its figures; nothing where there is no chart."""
        if chart:
            name = f"chart-{len(self._charts) + 1}"
            self._charts[name] = chart | {"description": f"{title}. {says}"}
            caption = tag("figcaption", tag("b", f"{title}. "), says)
            yield tag("figure", caption, tag("div", id=name, class_="chart"))

    def _verdict(self) -> Iterator[Element]:
        for verdict in verdict_lib.verdict(self._arms):
            facts = tag("ul", *(tag("li", fact) for fact in verdict.facts))
            content = [tag("p", verdict.headline, class_="headline"), *([facts] if verdict.facts else [])]
            yield tag("div", *content, class_="verdict")
        for run in self._runs:
            if run.state != "finished":
                yield tag("p", f"{run.name} is {run.state}: its figures are those of step {run.rows[-1]['step']:,}.")
            for text in filter(None, (run.failure, run.problem)):
                yield tag("p", f"{run.name}: {text}")

    def _curves(self) -> Iterator[Element]:
        most = max(len(arm.runs) for arm in self._arms)
        if most > 1:
            yield tag("p", "Lines are medians over the seeds of an arm, bands reach from quartile to quartile.")
        second = next((name for name in _SECOND if any(arm.last(name) for arm in self._arms)), None)
        columns = {"train/loss": "training loss", **({second: _words(second)} if second else {})}
        figures = []
        for column, title in columns.items():
            ends = f"At the end: {'; '.join(self._ends(column))}."
            paces = f"A step takes: {'; '.join(map(_pace, self._arms))}."
            for over_seconds, unit, says in ((False, "steps", ends), (True, "seconds", paces)):
                chart = charts.curves(self._arms, column, over_seconds=over_seconds, title=title)
                figures += self._figure(chart, f"{title.capitalize()} over {unit}", says)
        yield tag("div", *figures, class_="charts") if figures else tag("p", "No run has measured a loss or an error.")

    def _ends(self, column: str) -> Iterator[str]:
        for arm in self._arms:
            if values := arm.last(column):
                yield f"{arm.name} {_form(column, statistics.median(values))}"

    def _noise(self) -> Iterator[Element]:
        yield tag(
            "p",
            "How far the gradient of one drawn example lies from the mean gradient, as the root of its variance "
            "(√Tr Σ), measured with the same parameters for three kinds of draws: uniform ones; those that the run "
            "made (actual); and draws in proportion to the exact norms, which no other draws can beat (ideal). The "
            "method works where actual lies near ideal and well below uniform.",
        )
        figures = []
        for arm in self._arms:
            uniform, actual, ideal = (arm.last(f"variance/{name}") for name in charts.NOISE)
            if not (uniform and actual and ideal):
                continue
            ends = [statistics.median(values) for values in (uniform, actual, ideal)]
            says = f"At the end: uniform {ends[0]:.3g}, actual {ends[1]:.3g}, ideal {ends[2]:.3g}. "
            if ends[1] > 0 and ends[2] > 0:
                actual_times, ideal_times = ((ends[0] / end) ** 2 for end in ends[1:])
                says += "In variance (the square), uniform draws have "
                says += f"{actual_times:.3g} times that of the draws made and " if arm.kind != UNIFORM else ""
                says += f"{ideal_times:.3g} times the least possible."
            figures += self._figure(charts.noise(arm), _capital(arm.name), says)
        yield tag("div", *figures, class_="charts") if figures else tag("p", "No run has measured it.")

    def _heat(self) -> Iterator[Element]:
        figures = []
        for run in self._sampled():
            for name, what in ((histograms.SCORES, "Scores"), (histograms.STALENESS, "Staleness of the scores")):
                says = f"The stronger the colour, the more examples. {_middle(run.rows, name)}"
                figures += self._figure(charts.heat(run.rows, name), f"{what} in {run.name}", says)
        if figures:
            yield tag(
                "p",
                "While a network learns, most scores fall, and the draws turn to the few examples whose scores stay "
                "large. The staleness of a score is how many steps ago the parameters were that gave it: stale scores "
                "make draws less exact.",
            )
            yield tag("div", *figures, class_="charts")
        else:
            yield tag("p", "No run here has recorded how its scores are distributed; uniform runs have no scores.")

    def _examples(self) -> Iterator[Element]:
        sampled = list(self._sampled())
        if not sampled:
            yield tag("p", "No run here samples by importance: there are no scores.")
        for run in sampled:
            yield from gallery.gallery(run.name, run.folder)

    def _sampled(self) -> Iterator[Run]:
        """Yields the first run of each arm that has scores, or of which that is not known."""
        for arm in self._arms:
            if arm.kind == IMPORTANCE or any(
                histograms.known_counts(arm.runs[0].rows[-1], n) for n in histograms.EDGES
            ):
                yield arm.runs[0]

    def _table(self) -> Iterator[Element]:
        rows = []
        for name, run in ((arm.name, run) for arm in self._arms for run in arm.runs):
            last, pace = run.rows[-1], seconds_per_step([run.rows])
            ends = [_form(name, last[name]) if last.get(name) is not None else "–" for name in ("train/loss", *_SECOND)]
            rows.append(
                (run.name, name, str(run.config.get("seed", "–")), run.state, f"{last['step']:,}", *ends,
                 f"{1e3 * pace:.3g}" if math.isfinite(pace) else "–",
                 f"{last['worker_examples']:,}" if isinstance(last.get("worker_examples"), int) else "–")
            )  # fmt: skip
        header = (
            "run",
            "arm",
            "seed",
            "state",
            "step",
            "training loss",
            *map(_words, _SECOND),
            "ms a step",
            "scored by workers",
        )
        yield page.table("Runs at their last measurement", header, rows)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(column: str) -> str:
    split, _, name = column.partition("/")
    return f"{'training' if split == 'train' else split} {name}"


def _form(column: str, value: float) -> str:
    return f"{value:.2%}" if column.endswith("/error") else f"{value:.4g}"


def _pace(arm: Arm) -> str:
    pace = seconds_per_step(arm.histories)
    return f"{arm.name} {1e3 * pace:.3g} ms" if math.isfinite(pace) else f"{arm.name} not known"


def _middle(rows: list[dict], name: str) -> str:
    """Returns a sentence with the bins in which the median lay, first and last."""
    measured = [row for row in rows if sum(histograms.known_counts(row, name) or [])]
    if not measured:
        return ""
    places = []
    for row in (measured[0], measured[-1]):
        counts = row[name]
        places.append(next(i for i, s in enumerate(itertools.accumulate(counts)) if 2 * s >= sum(counts)))
    first, last = (charts.bin_text(name, place) for place in places)
    return f"The median lay at {first} in step {measured[0]['step']:,}, at {last} in step {measured[-1]['step']:,}."

"""The page about runs: what it says, that it is one harmless file, and what cannot be shown."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from issgd_jax.errors import InputError
from issgd_jax.extras import MissingExtraError
from issgd_jax.run import histograms
from issgd_jax.view import charts, runs
from issgd_jax.view.report import report
from issgd_jax.view.verdict import verdict
from tests.view.helpers import write_checkpoint, write_run, write_scores

N = 1437
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Elements of a page as (name, attributes, text inside)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        element = (name, dict(attributes), [])
        self.elements.append(element)
        if name not in VOID:
            self._open.append(element)

    def handle_endtag(self, name):
        assert self._open.pop()[0] == name

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, name):
        return [(attributes, "".join(texts)) for found, attributes, texts in self.elements if found == name]

    @property
    def text(self):
        return " ".join(self.all("body")[0][1].partition('{"config"')[0].split())


def spoil(folder, **values):
    """Sets fields of the config that a run has recorded, `group__field`."""
    record = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        group, _, field = name.rpartition("__")
        (record["config"][group] if group else record["config"])[field] = value
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def write(folder, *, seed=0, losses=(2.0, 0.2, 0.02), step_seconds=0.1, **values):
    """Writes a run whose rows have those losses, ten steps apart."""
    write_run(folder, steps=range(0, 10 * len(losses), 10), of=10 * (len(losses) - 1))
    counts = [0] * (len(histograms.SCORE_EDGES) - 1)
    counts[20], counts[22] = 5, 15
    rows = [
        {
            "step": 10 * place,
            "step_seconds": 10 * step_seconds * place,
            "train/loss": loss,
            "test/error": 0.5 / (1 + place),
            "variance/uniform": 4.0,
            "variance/actual": 2.0,
            "variance/ideal": 1.0,
            "variance/gain": 4.0,
        }
        | ({} if values.get("proposal__name") == "uniform" else {histograms.SCORES: counts})
        for place, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return spoil(folder, seed=seed, **values)


@pytest.fixture
def folders(tmp_path):
    """Two seeds that sample by importance, the first with scores, and two that draw uniformly."""
    folders = []
    for seed in (0, 1):
        folders.append(write(tmp_path / "runs" / f"importance-{seed}", seed=seed))
        slow = write(tmp_path / "runs" / f"uniform-{seed}", seed=seed, losses=(2.0, 1.0, 0.2), proposal__name="uniform")
        folders.append(slow)
    write_scores(folders[0], np.arange(N) % 100 / 10, np.full(N, 15), times_drawn=np.full(N, 2000, np.int32))
    return folders


def made(workdirs, tmp_path):
    return Page(report(workdirs, tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_loads_nothing(folders, tmp_path):
    """Red if a part is missing, a heading skipped, a picture or a table mute, or anything fetched."""
    page = made(folders, tmp_path)
    levels = [int(name[1]) for name, *_ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption")) >= 4
    assert len(images := page.all("img")) == 24
    assert all("label" in image["alt"] and image["src"].startswith("data:image/png;base64,") for image, _ in images)
    assert all(link["href"].startswith("#") for link, _ in page.all("a")) and not page.all("link")
    assert all("src" not in script for script, _ in page.all("script"))
    assert "default-src 'none'" in str(page.all("meta"))
    (drawn,) = (json.loads(text)["charts"] for attributes, text in page.all("script") if attributes.get("id"))
    assert {attributes["id"] for attributes, _ in page.all("div") if attributes.get("class") == "chart"} == drawn.keys()
    assert len(drawn) == 7 and all(chart["description"] for chart in drawn.values())
    assert (tmp_path / "report.html").stat().st_size < 2e6
    for part in (
        "sampling helped: it reached the final training loss of uniform draws in 2.0 times fewer steps and",
        "Training loss 0.2, at which uniform draws end, took 10 steps", "proposal.name", "calibrated",
        "the variance of the gradient was 4.0 times smaller", "half of the sum of all scores", "score 9.9",
        "staleness 5", "drawn 2,000 times",
    ):  # fmt: skip
        assert part in page.text, part


def test_a_uniform_seed_that_ends_above_the_median_has_used_its_steps(tmp_path):
    """Red if the verdict on two seeds is that uniform draws needed infinitely many steps."""
    for seed, last in ((0, 0.2), (1, 0.4)):
        write(tmp_path / f"importance-{seed}", seed=seed)
        write(tmp_path / f"uniform-{seed}", seed=seed, losses=(2.0, 1.0, last), proposal__name="uniform")
    (found,) = verdict(runs.arms(runs.read([tmp_path])))
    assert re.search(r"in 2\.\d times fewer steps and 2\.\d times less time", found.headline), found
    assert "inf" not in str(found)


@pytest.mark.parametrize(
    ("sampled", "uniform", "says"),
    [
        ({}, {"losses": (2.0, 1.0, 0.2)}, "seems to have helped: .* in 2.0 times fewer steps and 2.0 times less time"),
        ({"step_seconds": 0.2}, {"losses": (2, 1, 0.2)}, "not in time: .*2.0 times fewer steps and as much time"),
        ({"step_seconds": 0.8}, {"losses": (2, 1, 0.2)}, "helped in steps, not in time: .* and 4.0 times more time"),
        ({}, {}, "made no difference"),
        ({"losses": (2.0, 1.0, 0.2)}, {"losses": (2.0, 0.2, 0.2)}, "not to have helped: .* 2.0 times more steps"),
        ({"losses": (2.0, 1.0, 0.2)}, {"losses": (2.0, 0.2, 0.2), "step_seconds": 0.4}, "helped in time, not in steps"),
        ({"losses": (2.0, 1.0, 0.5)}, {}, "did not help: it never reached"),
        ({"losses": (2.0, None, None)}, {}, "did not help: it never reached"),
        ({}, {"losses": (None, None, None)}, "Nothing can be compared .* no training loss that is finite"),
        ({"losses": (2.0,)}, {"losses": (2.0,)}, "made no difference"),
        ({"losses": (0.0, 0.0)}, {"losses": (0.0, 0.0)}, "made no difference"),
        ({}, {"data__name": "mnist"}, "Nothing can be compared .* other data, or another model"),
        ({}, {"model__name": "cnn"}, "Nothing can be compared .* other data, or another model"),
        ({}, None, "Nothing can be compared .* no run here draws uniformly"),
        (None, {}, "Nothing can be compared: no run here samples by importance"),
    ],
)  # fmt: skip
def test_verdicts(sampled, uniform, says, tmp_path):
    """Red if a comparison that does not hold is told, or one that does is not."""
    folders = []
    for name, values in (("importance", sampled), ("uniform", uniform)):
        if values is not None:
            folders.append(
                write(tmp_path / name, proposal__name="uniform" if name == "uniform" else "calibrated", **values)
            )
    found = verdict(runs.arms(runs.read(folders)))[0]
    assert re.search(says, found.headline), found
    if len(folders) == 2 and "Nothing" not in says:
        assert "An arm has a single seed: chance is not excluded." in found.facts


def test_what_weakens_a_comparison_is_told(folders, tmp_path):
    """Red if other fields that differ, seeds that overlap, or a baseline that is not the best are passed over."""
    for folder in folders[1::2]:
        spoil(folder, learner__learning_rate=0.02)
    write(folders[0], losses=(2.0, 1.0, 0.2))
    best = write(tmp_path / "best", losses=(2.0, 0.2, 0.1), proposal__name="uniform")
    facts = " ".join(verdict(runs.arms(runs.read(folders)))[0].facts)
    assert "The arms also differ in learner.learning_rate (0.05 and 0.02)." in facts and "Some seeds" in facts
    facts = " ".join(verdict(runs.arms(runs.read([*folders, best])))[0].facts)
    assert "Training loss 0.1, at which uniform draws end" in facts


def test_seeds_are_one_arm_and_names_tell_arms_apart(folders, tmp_path):
    """Red if runs of other configs are mixed, or two lines have one name."""
    arms = runs.arms(runs.read(folders))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("importance sampling", 2), ("uniform (SGD)", 2)]
    large = write(tmp_path / "large", learner__batch_size=64, log__progress=False)
    lost = write(tmp_path / "lost")
    (lost / "config.json").unlink()
    names = [arm.name for arm in runs.arms(runs.read([*folders, large, lost]))]
    batch = json.loads((folders[0] / "config.json").read_text())["config"]["learner"]["batch_size"]
    assert names == [
        f"importance sampling, batch_size {batch}",
        "importance sampling, batch_size 64",
        "uniform (SGD)",
        "lost",
    ]
    skipped = write(tmp_path / "skipped", on_nonfinite="skip")  # biased, and so no seed of the others
    assert len(runs.arms(runs.read([*folders, skipped]))) == 3


def test_lines_are_medians_and_bands_quartiles(folders):
    arms = runs.arms(runs.read(folders))
    arms[0].runs[1].rows[1]["train/loss"] = 0.6
    chart = charts.curves(arms, "train/loss", over_seconds=True, title="loss")
    point = next(point for point in chart["data"]["values"] if point["line"] == arms[0].name and point["x"] == 1.0)
    assert (point["low"], point["y"], point["high"]) == (0.3, 0.4, 0.5)


def test_a_single_measurement_is_a_dot(tmp_path):
    """Red if a run that has measured once is in the legend, and not in the chart: a line needs two points."""
    arms = runs.arms(
        runs.read([write(tmp_path / "once", losses=(2.0,)), write(tmp_path / "more", learner__momentum=0)])
    )
    *_, dots = charts.curves(arms, "train/loss", over_seconds=False, title="loss")["layer"]
    (shown,) = dots["transform"]
    assert shown["filter"]["oneOf"] == [arm.name for arm in arms if arm.runs[0].name == "once"]


def test_heat_maps_show_shares_of_examples():
    """Red if a bin, its place or its share is another's, or rows of another version raise."""
    counts = [0] * (len(histograms.STALENESS_EDGES) - 1)
    counts[0], counts[3] = 1, 3
    name = histograms.STALENESS
    rows = [{"step": 0}, {"step": 5, name: counts}, {"step": 9, name: [1, 2]}, {"step": 10, name: counts}]
    cells = charts.heat(rows, name)["data"]["values"]
    assert [(cell["x"], cell["x2"], cell["bin"], cell["share"]) for cell in cells] == [
        (5, 10, "0", 0.25), (5, 10, "4 to 7", 0.75), (10, 15, "0", 0.25), (10, 15, "4 to 7", 0.75),
    ]  # fmt: skip
    assert charts.heat(rows[:1], name) is None and charts.heat([{"step": 0, name: [0] * len(counts)}], name) is None


HOSTILE = "</script><img src=x onerror=alert(1)>"


def hostile_run(parent):
    folder = write(parent / "<script>alert(1)<b>&amp;", problem=HOSTILE)
    record = json.loads((folder / "config.json").read_text())
    record |= {"command": ["issgd-jax train", HOSTILE], "versions": {HOSTILE: HOSTILE}, "git_commit": HOSTILE}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_text_of_a_run_is_never_part_of_the_page(tmp_path):
    """Red if a name or a field of a run becomes an element, or ends a script."""
    page = made([hostile_run(tmp_path), write(tmp_path / "other")], tmp_path)
    assert len(page.all("script")) == 3 and not page.all("img") and "onerror=alert(1)>" in page.text
    assert all("alert" not in text for attributes, text in page.all("script") if attributes.get("type") == "module")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_draws_every_chart_without_an_error(folders, tmp_path):
    """Red if a chart is malformed, a script fails, or text of a run is executed."""
    path = report([*folders, hostile_run(tmp_path)], tmp_path / "report.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = json.loads(re.search(r'<script type="application/json" id="charts">(.*?)</script>', done.stdout)[1])[
        "charts"
    ]
    assert done.stdout.count('class="marks"') == len(drawn) == 9
    text = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "learner steps" in text and "√Tr Σ" in text and "graphics-document" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: (run / "scores.npz").write_bytes(b"PK"), "The scores cannot be shown: .* is not a file of scores"),
        (lambda run: (run / "scores.npz").unlink(), "The scores cannot be shown: .* has no scores.npz"),
        (lambda run: write_scores(run, np.zeros(N), np.full(N, -1)), "has a score yet"),
        (lambda run: spoil(run, data__name="mnist", data__dir="/none"), "There are no images: "),
        (lambda run: spoil(run, data__train_split="test"), "There are no images: digits test has 360 examples"),
        (lambda run: spoil(run, problem="antigravity:fly"), "no images: the problem is one of the user's own"),
        (lambda run: (run / "config.json").write_text("{"), "importance-0: .*config.json cannot be read"),
        (lambda run: spoil(run, steps=10**6), "importance-0 is (running|stopped): its figures are those of step 20"),
        (lambda run: write_scores(run, np.zeros(N), np.full(N, 3)), "Hardest examples"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_told(change, says, folders, tmp_path):
    """Red if one file of a run spoils the page, or a part is missing without a word."""
    change(folders[0])
    page = made(folders, tmp_path)
    assert re.search(says, page.text), page.text
    assert "Did it help?" in page.text and "Loss and error" in page.text


def test_scores_of_a_run_that_has_not_ended_are_those_of_its_newest_checkpoint(folders, tmp_path):
    (folders[0] / "scores.npz").unlink()
    write_checkpoint(folders[0], 10, np.arange(N), np.full(N, 4))
    assert f"score {N - 1:.3g}" in made(folders, tmp_path).text


def test_uniform_runs_have_no_scores(folders, tmp_path):
    page = made(folders[1::2], tmp_path)
    assert "No run here samples by importance: there are no scores." in page.text and "16.0 times smaller" in page.text


def test_a_folder_of_runs_and_a_row_that_is_being_written(folders, tmp_path, run_command, monkeypatch):
    """Red if a running run, or the folder that `compare` leaves, has no report; or the default file is another."""
    monkeypatch.chdir(tmp_path)
    with open(folders[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tra')
    assert run_command("report", tmp_path / "runs") == (0, "report.html\n")
    assert "report on 4 runs" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("number", [1e100, -1e100, 1e-300, 0.0, None])
def test_any_number_can_be_shown(number, folders, tmp_path):
    """Red if a number that a run would not write raises."""
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v if k == "step" or isinstance(v, list) else number for k, v in row.items()} for row in rows]
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "NaN" not in (page := made(folders, tmp_path)).text and "inf " not in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: shutil.rmtree(run), "holds no run (no metrics.jsonl): name the --workdir of one"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no row of metrics yet: wait for the first"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "line 1 is not a row of metrics"),
    ],
)
def test_what_is_no_run_is_one_readable_error(change, message, folders, tmp_path):
    change(folders[0])
    with pytest.raises(InputError) as error:
        report(folders, tmp_path / "report.html")
    assert message in str(error.value) and not (tmp_path / "report.html").exists()


def test_without_the_library_of_charts_its_remedy_is_told(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"a report needs vl_convert: pip install 'issgd-jax\[train\]'"):
        report(folders, tmp_path / "report.html")


@pytest.mark.parametrize("output", ["none/report.html", "", "."])
def test_an_output_that_cannot_be_written(output, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--output|cannot be written"):
        report(folders, output)


def test_bins_cover_every_score_and_age():
    """Red if a score or a staleness falls between bins, or edges do not increase."""
    for edges in histograms.EDGES.values():
        assert edges[0] == 0 and all(a < b for a, b in itertools.pairwise(edges))
    assert (
        histograms.SCORE_EDGES[-1] > float(np.finfo(np.float32).max) and math.log2(histograms.STALENESS_EDGES[-1]) == 30
    )

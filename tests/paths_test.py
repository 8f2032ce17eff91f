"""A run is where it was asked for, or is refused: `~`, URLs, and every name that a file may have."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl.testing import flagsaver

import issgd_jax
from experiments.benchmarks import environment
from experiments.paper import command as paper
from issgd_jax import InputError, paths
from issgd_jax.run import metrics, status
from issgd_jax.task import data
from tests.helpers import SVHN, smoke, soak, steps_of

# ml_collections reads the config file so.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
NAMES = ["[x]*?", "a\\b", " ünï 日本\t{x} $a$ %s\n.", "-_'\"", "gs:", os.fsdecode(b"_\xff\xfe")]
MORE_NAMES = ["dot.", "~", "~root", "%20a#b?c", "a:b", "...", "*", "x" * 250, "\x01\x7f", "a|b&c;d", "e\u0301", "None"]
TINY = {"eval_every": 1, "proposal__name": "uniform", "model__mlp__hidden_sizes": (4,), "checkpoint__every_steps": 1}
FIELDS = ["steps=1", "eval_every=1", "proposal.name=uniform", "log.progress=False", "log.tensorboard=False"]
URL = "gs://bucket/run"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home folder, with another as the working folder."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(paths.cache_folder().parent))  # where the kernels are compiled already
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    yield folder
    assert not list(elsewhere.iterdir()), "something was written where it was not asked for"


def fields(*more):
    return [f"--config.{field}" for field in (*FIELDS, *more)]


def test_every_command_expands_the_home_folder(home, run_command):
    """Red if one makes, or looks into, a folder with the name `~`."""
    (home / "mine.py").write_text("from issgd_jax.config.digits import get_config\n")
    code, text = run_command("train", "--workdir=~/run", "--config=~/mine.py:smoke", *fields("log.tensorboard=True"))
    assert code == 0 and (home / "run" / "config.json").is_file() and list((home / "run").glob("events.out.*")), text
    code, text = run_command("status", "~/run")
    assert code == 0 and text.startswith(f"{home}/run: finished"), text
    assert run_command("plot", "~/run", "--output=~/plot.png") == (0, f"{home}/plot.png\n")
    assert (home / "plot.png").is_file()
    (home / "importance-0").symlink_to("run")
    other = fields("proposal.name=mixture", "schedule.score_delay=0")
    code, text = run_command("compare", "--workdir", "~", "--config", "~/mine.py:smoke", *other)
    assert code == 1 and text.startswith(f"error: {home}/importance-0 holds a run of another experiment"), text


def test_every_function_expands_the_home_folder(home):
    rows = issgd_jax.train(smoke(steps=1, **TINY), "~/run")
    assert issgd_jax.train(smoke(steps=1, **TINY), pathlib.Path("~/run")) == rows
    assert metrics.read_run("~/run") == metrics.read_metrics("~/run/metrics.jsonl") == rows
    assert status.read("~/run").startswith(f"{home}/run: finished")
    issgd_jax.plots.save(issgd_jax.plots.runs_figure({"run": rows}), "~/run/plot.png")
    assert (home / "run" / "plot.png").is_file()
    assert environment.path_argument("~/results.json") == home / "results.json"


def test_the_studies_expand_the_home_folder(home):
    with flagsaver.flagsaver():
        paper.FLAGS(["program", "--study=fair", "--workdir=~/paper"])
        assert paper.workdir() == home / "paper"
        paper.FLAGS(["program", "--study=fair", "--workdir=None", "--data_dir=None", "--width=None", "--steps=None"])
        assert paper.workdir() is None and paper.overrides() == {"data.dir": None}
        paper.FLAGS(["program", "--study=fair", f"--workdir={URL}"])
        with pytest.raises(InputError, match="--workdir is 'gs://bucket/run', but only folders of this machine"):
            paper.workdir()
        paper.FLAGS.unparse_flags()


def test_caches_and_data_expand_the_home_folder(home, monkeypatch):
    if not SVHN.is_dir():
        pytest.skip(f"svhn_cropped is not at {SVHN}")
    (home / "tfds").symlink_to(SVHN)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    first = data.load("svhn_cropped", "test[:3]", "~/tfds")
    assert len(list((home / "cache" / "issgd_jax").iterdir())) == 1
    monkeypatch.setenv("TFDS_DATA_DIR", "~/tfds")
    assert (data.load("svhn_cropped", "test[:3]").labels == first.labels).all()
    assert data.count("svhn_cropped", "test", "~/tfds") == 10_000
    for relative in ("cache", ""):  # which the specification of XDG has ignored
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert paths.cache_folder() == home / ".cache" / "issgd_jax"


@pytest.mark.parametrize("url", [URL, "s3://bucket", "file:///tmp/run", "https://host/run"])
def test_a_url_is_refused_in_words(url, home, run_command):
    refused = f"is {url!r}, but only folders of this machine work: mount the storage, and name the folder\n"
    for arguments in (
        ["train", f"--workdir={url}", *fields()],
        ["compare", f"--workdir={url}", *fields()],
        ["train", "--workdir=run", f"--config={url}.py", *fields()],
        ["plot", url],
        ["plot", str(home), f"--output={url}"],
        ["status", url],
    ):
        code, text = run_command(*arguments)
        assert code == 1 and text.replace(".py'", "'").endswith(refused) and text.count("\n") == 1, text
    code, text = run_command("train", "--workdir=run", *fields(f"data.dir={url}"))
    assert code == 1 and f"data.dir must be a folder of this machine, not a URL, got {url!r} (see --config" in text
    with pytest.raises(InputError, match="data.dir is .*, but only folders of this machine work"):
        data.load("svhn_cropped", "train", url)
    for path in (url, pathlib.Path(url), os.fsencode(url)):
        with pytest.raises(InputError, match="only folders of this machine work"):
            issgd_jax.train(smoke(steps=1, **TINY), path)


@pytest.mark.parametrize("path", ["", "a\0b", None, 3, "~nobody-has-this-name/run"])
def test_what_is_no_path_is_refused(path, home):
    with pytest.raises(InputError, match="workdir"):
        issgd_jax.train(smoke(steps=1, **TINY), path)


@pytest.mark.parametrize("name", ["/".join(NAMES), *soak([], NAMES + MORE_NAMES)], ids=ascii)
def test_a_run_in_a_folder_of_any_name_goes_on(name, tmp_path, run_command, capsys):
    """Red if a library takes the name for a pattern, an escape or an address, and checkpoints are not found again."""
    workdir = tmp_path / name
    issgd_jax.train(smoke(steps=1, log__tensorboard=True, **TINY), workdir)
    rows = issgd_jax.train(smoke(steps=2, log__tensorboard=True, **TINY), workdir)
    assert [row["step"] for row in rows] == [0, 1, 2] and steps_of(workdir) == [1, 2]
    said = capsys.readouterr().err
    assert "resumes from the checkpoint of step 1 of 2" in said and "cannot" not in said and "could not" not in said
    assert len(list(workdir.glob("events.out.*"))) == 1
    assert run_command("status", str(workdir))[0] == 0
    code, text = run_command("plot", str(workdir), f"--output={workdir / workdir.name}.png")
    assert (code, (workdir / f"{workdir.name}.png").is_file()) == (0, True), text


def test_a_relative_name_is_that_of_the_working_folder(tmp_path, monkeypatch, run_command):
    """Red if `./~` or `./gs:` means something else the second time that it is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("-x", "./~", "./gs:/a", "./~root", "./gs:"):
        once = paths.local_path(name, "workdir")
        assert paths.local_path(once, "workdir") == once and once.absolute() == tmp_path / name
    code, text = run_command("train", "--workdir=./~/-x", "--config.model.mlp.hidden_sizes=4", *fields())
    assert code == 0 and (tmp_path / "~" / "-x" / "metrics.jsonl").is_file(), text
    monkeypatch.chdir(tmp_path / "~")
    assert run_command("status", "--", "-x")[0] == run_command("plot", "--output=-.png", "--", "-x")[0] == 0


def test_data_in_a_folder_of_any_name(tmp_path, monkeypatch):
    """Red if TFDS takes the name for a pattern; or if the cache does not know the data under another name again."""
    if not SVHN.is_dir():
        pytest.skip(f"svhn_cropped is not at {SVHN}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = data.load("svhn_cropped", "test[:3]", str(SVHN))
    for name in NAMES:
        (tmp_path / name).symlink_to(SVHN)
        assert (data.load("svhn_cropped", "test[:3]", str(tmp_path / name)).images == expected.images).all()
    assert len(list((tmp_path / "cache" / "issgd_jax").iterdir())) == 1
    with pytest.raises(InputError) as error:
        data.load("cifar10", "train", str(tmp_path / NAMES[0] / "no"))
    assert f"{SVHN.resolve()}/no/cifar10" in str(error.value)  # and not a link that is gone


def test_names_that_the_terminal_cannot_show(tmp_path):
    """A process of its own, whose output is ASCII: red if it ends in a UnicodeEncodeError."""
    folder = tmp_path / os.fsdecode(b"\xff\xc3\xbc")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "agg"}
    for arguments in (["status", folder], ["plot", folder, f"--output={folder / 'plot.png'}"]):
        done = subprocess.run(
            [sys.executable, "-m", "issgd_jax", *arguments], capture_output=True, env=environment, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"") and b"\\udcff\\xfc" in done.stdout


def test_a_folder_that_cannot_be_looked_into(tmp_path, run_command):
    """Red if a name that is too long, or one below a file, ends in a traceback."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / ("x" * 300), tmp_path / "file" / "run"):
        for arguments in (["status", str(folder)], ["plot", str(folder)], ["train", f"--workdir={folder}", *fields()]):
            code, text = run_command(*arguments)
            assert code == 1 and text.startswith("error: ") and text.count("\n") == 1, text

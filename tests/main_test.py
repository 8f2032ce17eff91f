"""The program as a person runs it: flags, files, exit codes, one readable line for each mistake.

Most run in this process, which has JAX already; those that need a process of their own say so.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import termios

import array_record.python.array_record_data_source  # noqa: F401  defines flags; `flagsaver` would remove them again
import pytest
from absl import flags
from absl.testing import flagsaver

from issgd_jax import compare
from issgd_jax import config as config_lib
from issgd_jax import main as main_lib
from issgd_jax.config import digits as digits_config
from tests.helpers import SVHN, smoke, soak

ROOT = pathlib.Path(__file__).parents[1]
# ml_collections reads the config file so.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("[!_]*.py"))


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)`: the program in this process, with the exit code that Python gives its `SystemExit`."""
    monkeypatch.chdir(ROOT)

    def call(*arguments, program=main_lib.main):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        flags.FLAGS.unparse_flags()
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            main_lib.run(program)
        out, err = capsys.readouterr()
        code = ended.value.code
        return Done(1, out, f"{err}{code}\n") if isinstance(code, str) else Done(code or 0, out, err)

    return call


def run_process(*arguments, module="issgd_jax.main"):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def config(name, options=""):
    return f"--config=experiments/configs/{name}.py{options}"


# Set 2 is set 1 with two other numbers.
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if soak(path.stem != "svhn_paper_set2", True)], ids=lambda path: path.stem
)
def test_every_config_runs_under_smoke(path, tmp_path, run):
    name, arguments = path.stem, []
    if name.startswith("svhn"):
        if not SVHN.is_dir():
            pytest.skip(f"svhn_cropped is not at {SVHN}")
        arguments = [f"--config.data.dir={SVHN}"]
    done = run(config(name, ":smoke"), f"--workdir={tmp_path / 'run'}", *arguments)
    if name == "fashion_mnist" and "error: fashion_mnist is not at" in done.stderr:
        pytest.skip("fashion_mnist is not in the default folder of TFDS (set TFDS_DATA_DIR)")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40 and rows[-1]["scores/scored_fraction"] == 1


def load(path, options=""):
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["get_config"](options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_the_same_fields_and_is_valid(path):
    for options in ("", "smoke"):
        built = load(path, options)
        assert list(config_lib.flatten(built)) == list(config_lib.flatten(config_lib.default()))
        config_lib.validate(built)


def test_the_paper_configs_have_the_papers_values():
    first, second = (load(ROOT / "experiments" / "configs" / f"svhn_paper_set{i}.py") for i in (1, 2))
    for paper in (first, second):
        assert paper.model.mlp.hidden_sizes == (2048,) * 4 and paper.model.mlp.init_stddev == 0.01
        assert (paper.learner.batch_size, paper.workers.chunk_size, paper.devices.workers) == (128, 2048, 3)
        assert paper.learner.optimizer == "sgd" and paper.learner.momentum == 0.95 and paper.learner.nesterov
        assert paper.proposal.name == "proportional"
    assert (first.learner.learning_rate, first.proposal.smoothing) == (0.01, 10)
    assert (second.learner.learning_rate, second.proposal.smoothing) == (0.001, 1)


def run_in_terminal(*arguments):
    """Returns what the program shows in a terminal of 80 columns, each time it draws its bar."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-m", "issgd_jax.main", *arguments], cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux: the program has closed its end
            while data := os.read(ours, 4096):
                shown += data
    os.close(ours)
    assert process.returncode == 0, shown
    return [frame.strip() for frame in shown.decode().split("\r") if frame.strip()]


def test_a_process_of_its_own_takes_flags_for_any_field_and_shows_a_bar(tmp_path):
    """Red if the bar is silent while programs are compiled, counts wrongly after a resumption, or is wider than 80."""
    arguments = [
        config("digits", ":smoke"), f"--workdir={tmp_path / 'small'}", "--config.model.mlp.hidden_sizes=(16,)",
        "--config.devices.workers=2", "--config.learner.learning_rate=0.02",
    ]  # fmt: skip
    for first, last in ((0, 7), (7, 9)):
        frames = run_in_terminal(*arguments, f"--config.steps={last}")
        if first:
            assert frames.pop(0) == f"issgd_jax: resumes from the checkpoint of step {first} of {last}"
        assert frames[0] == f"small: {first}/{last} steps, compiling"
        assert re.match(rf"small \|.*\| {first + 1}/{last} 00:00<\?", frames[1]), frames[1]
        assert re.match(rf"small \|.*\| {last}/{last} .*step/s, loss=\d.* test=\d.*% gain=\d", frames[-1]), frames[-1]
        assert all(len(frame) <= 80 for frame in frames[1:])  # and no output of the libraries
    record = json.loads((tmp_path / "small" / "config.json").read_text())
    assert record["config"]["steps"] == 9 and record["config"]["model"]["mlp"]["hidden_sizes"] == [16]
    assert len(record["devices"]["workers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.learner.learning_rat=1"],
            "no field 'learner.learning_rat': did you mean learner.learning_rate?",
        ),
        (["--config.data.nam=x"], "did you mean data.name?"),
        (["--config.data.name=digts"], "unknown data set 'digts': did you mean digits"),
        (["--config.learner.batch_size=many"], "learner.batch_size=many"),
        (["--config.proposal.smoothing=-1"], "proposal.smoothing must be >= 0"),
        (["--config.devices.workers=12"], "devices.workers must be between 1 and 3"),
        (
            ["--config.learner.learning_rate=1e30", "--config.proposal.name=uniform"],
            "minibatch loss or gradient is not",
        ),
        (["extra"], "unknown arguments"),
    ],
)
def test_a_mistake_is_one_readable_error_and_no_traceback(arguments, message, tmp_path, run):
    done = run(config("digits", ":smoke"), f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert "gradient" in message or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([config("digitz"), "--workdir=x"], "does not exist: did you mean experiments/configs/digits.py?"),
        ([config("digits")], "workdir"),
        ([config("digits", ":smok"), "--workdir=x"], "unknown config option 'smok': the only one is smoke"),
        ([config("digits", ":smoke"), "--workdir=/proc/x/run"], "cannot be written"),
        ([config("digits", ":smoke"), "--workdir="], "--workdir is empty"),
    ],
)
def test_flags_that_are_missing_or_wrong(arguments, message, run):
    done = run(*arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_process_of_its_own_ends_a_mistake_with_one_line_and_status_1(tmp_path):
    done = run_process(config("digits", ":smoke"), f"--workdir={tmp_path}", "--config.data.nam=x")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: config has no field 'data.nam': did you mean data.name?\n"


def test_without_a_config_the_experiment_is_digits_and_its_fields_can_be_overridden(tmp_path, run):
    arguments = ["steps=2", "eval_every=2", "proposal.name=uniform", "log.progress=False"]
    done = run(f"--workdir={tmp_path / 'run'}", *(f"--config.{argument}" for argument in arguments))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (saved["data"]["name"], saved["learner"]["batch_size"], saved["steps"]) == ("digits", 16, 2)


@pytest.fixture
def parse(monkeypatch):
    """`parse(*arguments)`: fields of the config, and the value of every other flag."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        flags.FLAGS.unparse_flags()
        with flagsaver.flagsaver():
            assert main_lib.parse_flags(["program", *arguments]) == ["program"]
            values = {name: flags.FLAGS[name].value for name in ("workdir", "overwrite", "uniform_rate", "seeds")}
            return config_lib.flatten(flags.FLAGS.config) | values

    return call


def test_every_field_that_may_be_none_can_be_set_to_none(parse):
    """Red if a field becomes the text 'None', or its number is asked for."""
    optional = [field.name for field in config_lib.FIELDS if field.is_optional]
    values = parse(*(f"--config.{name}=None" for name in optional))
    assert len(optional) > 10 and {name: values[name] for name in optional} == dict.fromkeys(optional)
    assert parse("--config.devices.workers=3", "--config.devices.workers=None")["devices.workers"] is None
    assert parse("--config.devices.workers=None", "--config.devices.workers=3")["devices.workers"] == 3
    assert parse("--config.data.dir", "None", "--config.data.name=Nonesuch")["data.name"] == "Nonesuch"
    values = parse("--uniform_rate=None", "--workdir=None")
    assert values["uniform_rate"] is None and values["workdir"] is None


@pytest.mark.parametrize("field", config_lib.FIELDS, ids=lambda field: field.name)
def test_a_field_that_may_not_be_none_is_refused_by_its_name(field, parse, tmp_path, run):
    if field.is_optional:
        parse(f"--config.{field.name}=None")
        return
    done = run(f"--workdir={tmp_path / 'run'}", f"--config.{field.name}=None")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"error: {field.name} must be of type {field.type.__name__}, got None" in done.stderr


def test_of_a_flag_that_is_given_twice_the_last_counts(parse, tmp_path):
    """Red if tuples are joined, or the first experiment's fields stay."""
    sizes = "--config.model.mlp.hidden_sizes"
    assert parse(f"{sizes}=(16,)", f"{sizes}=(32, 8)")["model.mlp.hidden_sizes"] == (32, 8)
    assert parse(f"{sizes}=(16,)", sizes, "8")["model.mlp.hidden_sizes"] == (8,)
    assert parse(f"{sizes}=[16, 4]", f"{sizes}=()")["model.mlp.hidden_sizes"] == ()
    assert parse("--config.steps=3", "--config.steps=5")["steps"] == 5
    assert parse("--config.learner.nesterov=False", "--config.learner.nesterov")["learner.nesterov"] is True
    assert parse("--config.learner.nesterov", "--noconfig.learner.nesterov")["learner.nesterov"] is False
    assert parse("--workdir=a", "--workdir=b", "--overwrite", "--nooverwrite")["workdir"] == "b"
    (tmp_path / "executed.py").write_text("raise SystemExit('the file that does not count is executed')")
    twice = [f"--config={tmp_path / 'executed.py'}", f"{sizes}=(16,)", config("digits", ":smoke")]
    values = parse(*twice, f"{sizes}=(4, 4)")
    assert values["model.mlp.hidden_sizes"] == (4, 4) and values["steps"] == 40
    (tmp_path / "flags").write_text(f"{config('digits', ':smoke')}\n--config.seed=7\n")
    values = parse(f"--flagfile={tmp_path / 'flags'}", "--config.seed=8")
    assert values["steps"] == 40 and values["seed"] == 8


@pytest.mark.parametrize("text", ["(", "16,,8", "f(1)", "None", "'a'", "(1.5,)", "", "(" * 300, "{1: 2}", "9" * 5000])
def test_a_tuple_that_is_none(text, tmp_path, run):
    done = run(f"--workdir={tmp_path / 'run'}", f"--config.model.mlp.hidden_sizes={text}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "hidden_sizes" in done.stderr, done.stderr


@pytest.mark.parametrize("program", [main_lib.main, compare.main], ids=["train", "compare"])
def test_help_lists_every_flag_and_every_field_with_its_default_and_its_documentation(program, run):
    done = run("--help", program=program)
    assert done.returncode == 0 and not done.stderr
    for name in ("config", "workdir", "overwrite", *(("seeds", "uniform_rate") if program is compare.main else ())):
        assert f"\n--{name}: " in done.stdout
    values = config_lib.flatten(digits_config.get_config())  # what runs without --config=FILE.py
    for field in config_lib.FIELDS:
        assert f"\n--config.{field.name}={values[field.name]}: {field.doc}\n" in done.stdout + "\n"


def test_both_arms_side_by_side(tmp_path, run):
    done = run(config("digits", ":smoke"), f"--workdir={tmp_path}", program=compare.main)
    assert done.returncode == 0, done.stderr
    for line in (
        "steps to uniform's final training loss",
        "seconds to it, without compilation",
        "final training loss",
        "training error",
        "test error",
        "√Tr Σ uniform",
        "√Tr Σ actual",
        "√Tr Σ ideal",
        "variance gain",
    ):
        assert line in done.stdout
    assert str(tmp_path / "summary.png") in done.stdout
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.splitlines()[-1] == f"report   {tmp_path / 'report.html'}: open it in a browser"
    assert "report on 2 runs" in (tmp_path / "report.html").read_text()
    first = [
        json.loads((tmp_path / arm / "metrics.jsonl").read_text().splitlines()[0])
        for arm in ("importance-0", "uniform-0")
    ]
    assert first[0]["train/loss"] == first[1]["train/loss"]  # the same seed gives the same initial parameters


def test_what_is_compiled_after_a_comparison_warns_of_nothing():
    """Red if JAX still writes compiled programs into the folder of the comparison, which is gone."""
    code = (
        "import jax; from issgd_jax import compare; one = jax.numpy.ones\n"
        "before = dict(jax.config.values)\n"
        "with compare._shared_compilation(): jax.jit(lambda x: x + 1)(one(3))\n"
        "jax.jit(lambda x: 3 * x)(one(5))\n"
        "assert before == dict(jax.config.values)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, check=True)


def test_what_cannot_be_compared_is_said_before_anything_is_trained(tmp_path, run):
    """Red if an arm is trained before a flag of the other is found wrong, or a run is taken for a folder of runs."""
    start = [config("digits", ":smoke"), f"--workdir={tmp_path}"]
    done = run(*start, "--uniform_rate=-2", program=compare.main)
    assert done.stderr == "error: uniform_rate must be above 0 and finite, got -2.0\n"
    own = ["--config.problem=tests.own_problem:make_with_optimizer", "--uniform_rate=0.1"]
    done = run(f"--workdir={tmp_path}", *own, program=compare.main)
    assert "uniform_rate has no effect, as tests.own_problem:make_with_optimizer has an optimizer" in done.stderr
    (tmp_path / "metrics.jsonl").touch()
    done = run(*start, program=compare.main)
    assert f"{tmp_path} holds a run: name a folder for the runs of both arms" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("field", ["learner.learning_rate=5.0", "model.name=convnet", "data.name=mnist"])
def test_a_field_without_effect_on_a_problem_of_ones_own_is_refused(field, tmp_path, run):
    """Red if runs with different rates, networks or data are silently the same."""
    done = run(f"--workdir={tmp_path}", "--config.problem=tests.own_problem:make_with_optimizer", f"--config.{field}")
    assert done.returncode == 1 and f"--config.{field.partition('=')[0]} has no effect" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_table_leaves_out_what_no_arm_has_and_uniform_runs_reach_their_own_end():
    """Red if a seed of two that ends above the median makes the comparison infinite."""
    rows = [[{"step": 10 * i, "step_seconds": 0.1 * i, "train/loss": loss} for i, loss in enumerate(run)]
            for run in ((2.0, 0.4), (2.0, 0.6))]  # fmt: skip
    text = compare.table({compare.IMPORTANCE: rows, compare.UNIFORM: rows})
    reached = next(line for line in text.splitlines() if line.startswith("steps to uniform's final"))
    assert reached.split()[-1] == "9" and "error" not in text


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x = 1\n", "", "has no function get_config: see experiments/configs"),
        ("def get_config():\n    pass\n", ":smoke", "takes no options: leave out what follows the colon"),
        ("def get_config():\n    pass\n", "", "returned None, no ConfigDict"),
    ],
)
def test_a_config_file_that_is_none(text, options, message, tmp_path, run):
    (tmp_path / "mine.py").write_text(text)
    done = run(f"--config={tmp_path / 'mine.py'}{options}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("field", ["name=uniform", "when=off"])
def test_nothing_to_compare(field, tmp_path, run):
    done = run(config("digits", ":smoke"), f"--workdir={tmp_path}", f"--config.proposal.{field}", program=compare.main)
    assert done.returncode != 0 and "nothing to compare" in done.stderr and "Traceback" not in done.stderr


def test_a_rate_that_follows_the_gain_and_a_limit_are_compared_with_a_run_without_them(tmp_path):
    """Red if the uniform arm is refused, with no gain to follow and nothing to limit, or draws are not recorded."""
    rated = smoke(learner__rate_by_gain=True, steps=8, eval_every=4)
    histories = compare.compare(rated, tmp_path, seeds=1, uniform_rate=None, overwrite=False)
    assert [runs[0][-1]["step"] for runs in histories.values()] == [8, 8]
    arms = (tmp_path / "importance-0", tmp_path / "uniform-0")
    importance, uniform = (json.loads((arm / "config.json").read_text())["config"]["learner"] for arm in arms)
    assert importance["rate_by_gain"] and (importance["draw"], importance["limit"]) == ("stride", 5.0)
    assert not uniform["rate_by_gain"] and (uniform["draw"], uniform["limit"]) == ("shuffled", None)
    assert compare.compare(rated, tmp_path, seeds=1, uniform_rate=None, overwrite=False) == histories  # both are done


def test_a_folder_of_another_experiment_is_an_error_before_the_first_arm_runs(tmp_path, run):
    (tmp_path / "uniform-0").mkdir()
    (tmp_path / "uniform-0" / "metrics.jsonl").touch()
    done = run(config("digits", ":smoke"), f"--workdir={tmp_path}", program=compare.main)
    assert done.returncode != 0 and "holds a run already" in done.stderr and not (tmp_path / "importance-0").exists()

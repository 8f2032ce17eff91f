"""Every code block, command and link of the documentation works."""

import importlib
import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest

import issgd_jax
from issgd_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Commands that tests of their own run, or that are the shell's.
SHELL = ("source .venv/bin/activate", "for id in 0 1; do", "done; wait")
TESTED_ELSEWHERE = {
    "issgd_jax.config": "tests/config_test.py holds the page to it",
    "experiments.benchmarks": "minutes to hours; results are kept as JSON",
    "experiments.paper": "tests/experiments",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield pytest.param(line.strip(), id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page):
    """Red if a block raises, or uses a name that an earlier block of the page does not define."""
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


def test_the_first_number_of_the_readme_is_what_its_loop_prints(capsys):
    """Red if a reader sees something else than the comment says, by more than other draws would change."""
    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    (about,) = re.findall(r"# about (\d+), not 32", block)
    assert float(capsys.readouterr().out) == pytest.approx(float(about), rel=0.15)


def test_the_privacy_of_the_clipped_gradient_is_accounted_for():
    """Red if the block that meets dp-accounting, the one marked py, raises or names what the page does not define."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is no dependency of the tests")
    page, namespace = ROOT / "docs" / "gradient-norms.md", {}
    for block in [*blocks(page, "python"), *blocks(page, "py")]:
        exec(compile(block, page.name, "exec"), namespace)
    assert 0 < namespace["epsilon"] < 10


@pytest.mark.parametrize("command", list(commands()))
def test_commands_work(command, tmp_path):
    """Red if a command names a module, target, extra, config or field that is missing, or does not train."""
    if command in SHELL or not command:
        return
    words = shlex.split(command.rstrip("&"))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif words[:3] == ["pip", "install", "-e"]:
        assert words[3].removeprefix(".[").removesuffix("]") in EXTRAS
    elif words[:2] == ["issgd-jax", "train"]:
        check_run(words[2:], tmp_path)
    elif words[0] == "issgd-jax":
        assert words[1] in ("plot", "status", "watch", "report", "hardest")  # tests/command_test.py runs them
    else:
        assert words[:2] == ["python", "-m"], f"no rule for {command!r}"
        assert importlib.util.find_spec(words[2])
        assert any(words[2].startswith(module) for module in TESTED_ELSEWHERE)


def check_run(arguments, workdir):
    """Sets the fields as the flags do, and trains with smaller numbers; with data, processes or machines that are not
    here it only validates."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    assert flags.pop("workdir")
    path = ROOT / flags.pop("config", "experiments/configs/digits.py")
    config = importlib.import_module(f"experiments.configs.{path.stem}").get_config()
    for name, text in flags.items():
        field = name.removeprefix("config.")
        config_lib.check_field(field)
        group, _, key = field.rpartition(".")
        parent = config[group] if group else config
        parent[key] = parent.get_type(key)("1" if text.startswith("$") else text)
    config_lib.validate(config)
    if config.data.name != "digits" or config.cluster.address or config.distributed.coordinator:
        return
    config.steps = config.eval_every = 12
    config.model.convnet.channels, config.model.convnet.dense_size = (4, 4), 8
    config.data.train_split, config.data.test_split, config.workers.chunk_size = "train[:200]", "test[:50]", 40
    config.log.progress = config.log.tensorboard = False
    assert [row["step"] for row in issgd_jax.train(config, workdir)] == [0, 12]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "experiments" / "paper" / "README.md"], ids=lambda page: page.name)
def test_links_and_inline_commands_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:issgd_jax|experiments)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900

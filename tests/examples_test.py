"""Every example trains, in few more lines than without importance sampling, and its ordinary loop trains too."""

import functools
import pathlib
import re
import types

import pytest

from tests.helpers import soak

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))
MOST_CHANGED_LINES = 12
SMALL = {"transformer": {"num_examples": 60}}
# The ordinary loops of the others take longer than they tell.
ORDINARY = [path for path in EXAMPLES if soak(path.stem in ("equinox_mlp", "orbax_checkpoint", "regression"), True)]
CLAIM = r"^# Importance sampling: (\d+) lines added \(# \+\), (\d+) changed \(# was: the ordinary line\)\.$"
ADDED, CHANGED = re.compile(r"^.*  # \+$\n", re.M), re.compile(r"^( *)\S.*  # was: (.*)$", re.M)


def execute(path, source) -> types.ModuleType:
    module = types.ModuleType(path.stem)
    exec(compile(source, path, "exec"), module.__dict__)
    if hasattr(module, "make_data"):
        module.make_data = functools.cache(module.make_data)  # of the transformer, seconds; each `train` makes it
    return module


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def source(path):
    return path.read_text()


def test_it_trains_and_tells_what_is_gained(path, source, capsys):
    """Red if an example breaks, does not learn, or prints nothing."""
    example = execute(path, source)
    sizes = SMALL.get(path.stem, {})
    figures = example.main(steps=40, **sizes)
    assert figures["loss"] < example.train(steps=0, **sizes)["loss"]
    assert all(isinstance(value, float | int) for value in figures.values())
    assert f"{figures['equivalent_batch']:.0f}" in capsys.readouterr().out


@pytest.mark.parametrize("path", ORDINARY, ids=lambda path: path.stem)
def test_without_the_marked_lines_it_is_an_ordinary_loop_that_trains(path):
    """Red if a line that belongs to importance sampling is not marked, or an ordinary one does not run."""
    ordinary = CHANGED.sub(r"\1\2", ADDED.sub("", path.read_text()))
    before_main, _ = ordinary.split("\ndef main(")
    assert not re.search(r"issgd_jax|\bsampler\.\w", before_main)
    example = execute(path, ordinary)
    sizes = SMALL.get(path.stem, {})
    assert example.train(steps=40, **sizes)["loss"] < example.train(steps=0, **sizes)["loss"]


def test_it_claims_the_lines_that_it_changes_and_they_are_few(source):
    """Red if an example grows, or a line is marked but not counted."""
    claim = re.search(CLAIM, source, flags=re.M)
    assert [int(number) for number in claim.groups()] == [len(ADDED.findall(source)), len(CHANGED.findall(source))]
    assert sum(int(number) for number in claim.groups()) <= MOST_CHANGED_LINES


def test_it_says_what_it_shows_and_how_to_run_it(path, source):
    """Red if the command of an example is missing or of another file."""
    first_line, *_ = execute(path, source).__doc__.splitlines()
    assert first_line.endswith(".")
    assert f"\npython examples/{path.name}\n" in source
    assert source.endswith('\nif __name__ == "__main__":\n    main()\n')

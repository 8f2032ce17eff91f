"""What `pyproject.toml` promises of versions is what is tested."""

import pathlib
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared():
    """Returns the requirements that `make test` installs."""
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["train"], *extras["cluster"], *extras["test"]]
    return [Requirement(text) for text in texts if not text.startswith(PROJECT["name"])]


def pinned(name):
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().split()
    return {package.lower().replace("_", "-"): Version(version) for package, version in (x.split("==") for x in lines)}


def test_the_lowest_constraints_are_the_lower_bounds():
    """Red if a bound is lower than anything that was tested."""
    bounds = {r.name.lower(): Version(str(r.specifier).removeprefix(">=")) for r in declared()}
    lowest = pinned("lowest")
    assert bounds == {name: lowest.get(name) for name in bounds}


def test_the_newest_constraints_have_every_package_and_none_below_its_bound():
    newest = pinned("newest")
    assert all(newest[r.name.lower()] in r.specifier for r in declared())
    assert (newest["jax"] > pinned("lowest")["jax"]) and newest["jaxlib"] == newest["jax"]

"""A finished run, which tests of its folder copy."""

import pathlib
import shutil

import pytest

import issgd_jax
from tests.helpers import small


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder and rows of a run of 20 steps, with checkpoints of 7, 14 and 20, and perhaps of its best step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, issgd_jax.train(small(steps=20), folder)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run's folder."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))

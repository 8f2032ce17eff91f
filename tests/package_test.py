"""The package as others get it: its wheel, what a type checker sees of it, and the core without extras."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import issgd_jax
from tests.helpers import soak

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "issgd_jax"
SNIPPET = """
reveal_type(issgd_jax.Sampler)
reveal_type(issgd_jax.build_table)
issgd_jax.Sampler(num_examples=10, batch_sise=2)
issgd_jax.Samplr
issgd_jax.__version__ + 1
"""


def test_the_version_is_that_of_the_installation_and_loads_no_jax():
    """Red if asking for the version imports more than it needs."""
    code = "import sys, issgd_jax; print(issgd_jax.__version__); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == issgd_jax.__version__ == importlib.metadata.version("issgd-jax")


@pytest.mark.skipif(soak(True, False), reason="a minute: make lint and make soak run it")
def test_a_type_checker_sees_every_public_name_and_its_signature(tmp_path):
    """Red if a static import breaks, py.typed is missing, or `__getattr__` hides a misspelled name."""
    public = "\n".join(f"issgd_jax.{name}" for name in issgd_jax.__all__)
    (tmp_path / "snippet.py").write_text(f"import issgd_jax\n{public}\n{SNIPPET}")
    # Silent on the package itself, which `make lint` checks.
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", f"--cache-dir={tmp_path}", "snippet.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines() if "defined in" not in line]
    assert len(lines) == 6, done.stdout  # two types, three mistakes, the summary
    assert "num_examples: int, batch_size: int" in lines[0] and "Sampler" in lines[0]
    assert "v: " in lines[1] and "-> issgd_jax.sampling.table.Table" in lines[1]
    assert 'Unexpected keyword argument "batch_sise"' in lines[2]
    assert 'Module has no attribute "Samplr"' in lines[3]
    assert "Unsupported operand types for +" in lines[4]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from the sdist, which is built from what git would check out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "issgd_jax", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={out}", str(source)]
    subprocess.run(command, capture_output=True, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package(wheel):
    """Red if sampler.cc, py.typed, a module or a room without an entry in pyproject.toml is left out."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".new")
    }
    with zipfile.ZipFile(wheel) as files:
        packed = {name for name in files.namelist() if ".dist-info/" not in name}
    assert packed == expected and {"issgd_jax/py.typed", "issgd_jax/kernels/sampler.cc"} <= packed

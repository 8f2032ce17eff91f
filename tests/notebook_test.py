"""Every notebook runs as committed, with fewer steps, and defines nothing of its own that the package should have."""

import ast
import gc
import pathlib
import re
import tempfile

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


# The one line of each notebook that says how much is computed, as it is tested.
SIZES = {
    "quickstart": "STEPS, EVERY = (20, 40), 20",
    "variance_reduction": "STEPS, EVERY, DRAWS = 90, 3, 256",
    "your_model": "EPOCHS = 2",
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shrink(notebook, sizes):
    """Replaces the line that assigns the same names."""
    names = sizes.partition(" = ")[0]
    line = re.compile(rf"^{re.escape(names)} = .*$", re.MULTILINE)
    number = 0
    for cell in code_cells(notebook):
        cell.source, replaced = line.subn(sizes, cell.source)
        number += replaced
    assert number == 1, f"{number} lines assign {names}"


# The kernel's transport warns of what does not concern a notebook on one machine.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_pictures(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shrink(notebook, SIZES[path.stem])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    gc.collect()  # what the client leaves unclosed is found here, not in the next test
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning that a reader would see"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_and_defines_no_machinery(path):
    folders = (pathlib.Path.home(), pathlib.Path(tempfile.gettempdir()), path.parents[1])
    assert not [folder for folder in folders if f"{folder}/" in path.read_text()], "of the machine that executed it"
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert cell.outputs or cell.execution_count, "committed with its output"
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        defined = [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert {*defined} <= {"loss_fn", "step"}  # the reader's own loss, and the step of the reader's own loop

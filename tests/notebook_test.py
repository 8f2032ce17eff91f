"""Every notebook runs as committed, with fewer steps, and defines nothing of its own that the package should have."""

import ast
import gc
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


FEWER_STEPS = ("config.steps, config.eval_every = 1000, 25", "config.steps, config.eval_every = 100, 25")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# The kernel's transport warns of what does not concern a notebook on one machine.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_pictures(path, tmp_path):
    text = path.read_text()
    assert FEWER_STEPS[0] in text
    notebook = nbformat.reads(text.replace(*FEWER_STEPS), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    gc.collect()  # what the client leaves unclosed is found here, not in the next test
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning that a reader would see"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_and_defines_no_machinery(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert cell.outputs or cell.execution_count, "committed with its output"
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        defined = [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        assert defined in ([], ["loss_fn"])  # the reader's own loss is the one thing to define

"""The rooms know each other one way only; a back door turns these red."""

import ast
import pathlib
import subprocess
import sys

import issgd_jax

PACKAGE = pathlib.Path(issgd_jax.__file__).parent

# A module may import only modules that stand above it.
ORDER = (
    "errors", "config", "workdir", "metrics", "supervision", "checkpoint",
    "data", "optimizer", "models", "losses", "gradnorm", "scores", "kernels", "processes", "devices", "store",
    "double_float", "sum_tree", "uniform", "sampling", "proposal", "calibrated",
    "variance", "payoff", "schedule", "workers", "cluster", "learner", "asgd", "evaluate", "plots", "run_state",
    "loop", "problem",
    "wiring", "training", "main",
)  # fmt: skip
# Neighbours in that order that still must not meet.
STRANGERS = {
    "learner": {"workers", "config", "metrics"},
    "asgd": {"workers", "config", "metrics"},
    "workers": {"store", "proposal", "sampling", "config"},
    "store": {"workers", "learner", "proposal", "config"},
    "plots": {"training"},
    "loop": {"config", "workdir"},
    "run_state": {"config", "workdir"},
    "checkpoint": {"config", "workdir"},
}
ONLY_IMPORTER = {"flax": {"models"}, "ml_collections": {"config", "main", "problem", "wiring", "training"}}


def imports(path):
    """Names of modules imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, set(imports(path))


def test_every_room_imports_only_what_stands_before_it():
    for room, imported in rooms():
        used = {name.split(".")[1] for name in imported if name.startswith("issgd_jax.")} - {room}
        assert used <= set(ORDER[: ORDER.index(room)]), f"{room} imports {used}"
        assert not used & STRANGERS.get(room, set()), f"{room} must not know {used & STRANGERS[room]}"


def test_flax_and_the_config_stay_in_their_rooms():
    for room, imported in rooms():
        for library, allowed in ONLY_IMPORTER.items():
            assert room in allowed or not any(name.split(".")[0] == library for name in imported), (
                f"{room} imports {library}"
            )


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_else():
    assert not loaded_after("import issgd_jax") & {"jax", "numpy", "flax", "matplotlib", "tensorflow_datasets"}


def test_gradnorm_stands_alone():
    loaded = loaded_after("from issgd_jax.gradnorm import per_example_grad_norms")
    assert "jax" in loaded and not loaded & {"flax", "optax", "ml_collections", "tqdm", "matplotlib"}


def test_plots_need_no_jax():
    assert "jax" not in loaded_after("import issgd_jax.plots, issgd_jax.run.metrics")


def test_training_loads_no_tfds_or_tensorflow():
    assert not loaded_after("import issgd_jax.run.training") & {"tensorflow_datasets", "tensorflow", "sklearn"}


def test_every_public_name_is_there():
    for name in issgd_jax.__all__:
        assert getattr(issgd_jax, name) is not None
    assert callable(issgd_jax.train)

"""Rooms import one way only; an import upwards, or a library in the wrong room, turns these red."""

import ast
import pathlib
import subprocess
import sys

import issgd_jax

PACKAGE = pathlib.Path(issgd_jax.__file__).parent

# Rooms and the modules beside them, lowest first: each may import only what stands before it.
ORDER = (
    "errors", "extras", "console", "interrupts", "paths", "files", "records", "provenance", "config", "history",
    "plots", "processes", "devices", "vmapped", "limits", "kernels", "gradnorm", "sampling", "loading", "scoring",
    "cluster", "task", "learning", "run", "view", "main", "compare", "prospect", "__main__",
)  # fmt: skip
# Inside a room too.
ORDER_IN = {
    "kernels": ("native", "tiles", "gram_tpu", "gram_hopper"),
    "config": ("schema", "checks", "columns", "page", "parsers", "digits", "__main__"),
    "sampling": (
        "checks", "in_place", "double_float", "uniform", "levels", "sum_tree", "table", "store", "min_tree", "visits",
        "draws", "state", "moments", "fallback", "level", "relative_limit", "proposal", "calibrated",
        "transitions", "sampler",
    ),
    "loading": ("source", "prefetch"),
    "scoring": ("scores", "schedule", "sweep", "workers"),
    "task": ("splits", "data", "models", "losses", "problem", "images"),
    "learning": ("variance", "potential", "rate_by_gain", "optimizer", "payoff", "learner", "asgd", "evaluate"),
    "run": (
        "orbax", "checkpoint", "checkpoints", "workdir", "histograms", "events", "pictures", "writers", "metrics",
        "progress", "status", "supervision", "parts", "run_state", "diagnosis", "measure", "rounds", "loop", "wiring",
        "training",
    ),
    "view": (
        "tail", "examples", "glance", "curves", "panel", "watch", "snapshots", "hardest", "scored", "runs", "verdict",
        "charts", "page", "gallery", "origins", "report",
    ),
}  # fmt: skip
# Rooms below that still must not be imported.
FORBIDDEN = {
    "gradnorm": {*ORDER} - {"vmapped", "limits", "kernels"},
    "kernels": {"config", "processes", "devices", "plots"},
    "sampling": {"config", "processes", "gradnorm", "plots"},
    "loading": {"config", "processes", "gradnorm", "plots"},
    "scoring": {"config", "sampling", "plots"},
    "cluster": {"config", "sampling", "gradnorm", "plots"},
    "learning": {"config", "scoring", "cluster", "task", "plots"},
}
ONLY_IMPORTER = {"flax": {"task"}, "ml_collections": {"config", "main", "compare", "prospect", "task", "run"}}


def imports(path):
    """Names of modules imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    """(parts of the path inside the package, imported names) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts, set(imports(path))


def test_a_room_imports_only_rooms_below_it():
    for (room, *_), imported in modules():
        used = {name.split(".")[1] for name in imported if name.startswith("issgd_jax.")} - {room}
        assert used <= set(ORDER[: ORDER.index(room)]), f"{room} imports {used}"
        assert not used & FORBIDDEN.get(room, set()), f"{room} must not import {used & FORBIDDEN[room]}"


def test_a_module_imports_only_modules_below_it_in_its_room():
    for (room, *rest), imported in modules():
        if room not in ORDER_IN or rest == ["__init__"]:
            continue
        prefix = f"issgd_jax.{room}."
        used = {name.removeprefix(prefix).split(".")[0] for name in imported if name.startswith(prefix)} - {rest[0]}
        below = ORDER_IN[room][: ORDER_IN[room].index(rest[0])]
        assert used <= set(below), f"{room}/{rest[0]} imports {used - set(below)}"


def test_flax_and_the_config_stay_in_their_rooms():
    for (room, *_), imported in modules():
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


def test_sampling_needs_no_optimiser_and_no_config():
    loaded = loaded_after("import issgd_jax.sampling")
    assert "jax" in loaded and not loaded & {"flax", "optax", "ml_collections", "tqdm", "matplotlib"}


def test_plots_need_no_jax():
    assert "jax" not in loaded_after("import issgd_jax.plots, issgd_jax.run.metrics")


def test_training_loads_no_tfds_or_tensorflow():
    assert not loaded_after("import issgd_jax.run.training") & {"tensorflow_datasets", "tensorflow", "sklearn"}


def test_every_public_name_is_there():
    for name in issgd_jax.__all__:
        assert getattr(issgd_jax, name) is not None
    assert callable(issgd_jax.train)


def test_editors_see_every_public_name():
    """Red if a name that loads lazily has no import that a type checker reads, or the reverse."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    static = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [node for node in static.body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in imported for alias in node.names}
    assert names == set(issgd_jax.__all__)

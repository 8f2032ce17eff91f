"""Four simulated CPU devices in every test process; programs compiled quickly, once, shared by all processes."""

import gc
import os
import random
import signal
import sys

import jax
import pytest

from tests import sharing
from tests.helpers import soak

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts with & ignore it
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
os.environ.setdefault("ISSGD_SOAK_SEED", str(random.randrange(2**31)))
# Tests compile for minutes and compute for seconds: without most optimizations, and with the older of the two
# generators of CPU code that XLA has up to JAX 0.10, that takes half the time; with a program generated in one part,
# not in several for threads that the cores are too few for, a quarter less. `make soak` compiles as users do.
if soak(True, False):
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the programs, notebooks and workers that tests start
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def pytest_report_header():
    """Prints what repeats a run of `make soak`."""
    if os.environ.get("ISSGD_SOAK") == "1":
        return f"soak: to repeat, set ISSGD_SOAK_SEED={os.environ['ISSGD_SOAK_SEED']}"
    return None


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Keeps compiled programs in one folder, which all processes of this run read."""
    shared = tmp_path_factory.getbasetemp().parent / "compiled"  # under xdist, the parent is common to all processes
    options = {"jax_compilation_cache_dir": str(shared), "jax_persistent_cache_min_compile_time_secs": 0.0}
    for option, value in options.items():
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def collected_rarely():
    """Keeps the collector of garbage off most of what JAX traces: a tenth of the time."""
    if soak(True, False):
        gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
    """Lets equal runs be traced once; `make soak` traces each, as users do."""
    if soak(True, False):
        sharing.share()


@pytest.fixture(autouse=True)
def programs_apart(request):
    """Keeps the programs of a test that replaces parts of the package apart from those of others."""
    if "monkeypatch" in request.fixturenames:
        sharing.forget()
        request.addfinalizer(sharing.forget)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """`run_command(*arguments)`: exit status of the command line, and what it prints."""
    # These define flags, which `flagsaver` would remove again.
    import array_record.python.array_record_data_source  # noqa: F401
    from absl import flags
    from absl.testing import flagsaver

    import issgd_jax.compare  # noqa: F401
    from issgd_jax import __main__ as command

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["issgd-jax", *map(str, arguments)])
        flags.FLAGS.unparse_flags()
        code = 0
        with flagsaver.flagsaver():
            try:
                command.main()
            except SystemExit as ended:
                code = ended.code
        out, err = capsys.readouterr()
        return (1, f"{out}{err}{code}\n") if isinstance(code, str) else (code or 0, out + err)

    return call


@pytest.fixture
def compilations():
    """The programs that are compiled, or read from the cache of compiled programs, while a test runs."""
    events = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)

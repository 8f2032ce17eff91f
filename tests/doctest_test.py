"""The examples in docstrings run as written, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import issgd_jax

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(issgd_jax.__path__, "issgd_jax.") if "__main__" not in module.name
)
# Modules whose import defines the flags of a program.
PROGRAMS = {"issgd_jax.main", "issgd_jax.compare"}


def examples_of(module):
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in PROGRAMS])
def test_the_examples_of_a_module_run(name):
    """Red if an example raises or prints anything else."""
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples_of(importlib.import_module(name)):
        output = []
        runner.run(test, out=output.append)
        assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("name", issgd_jax.__all__)
def test_every_public_name_has_an_example(name):
    """Red if a public function or class does not show how it is called; modules, errors and results need no example."""
    value = getattr(issgd_jax, name)
    if inspect.ismodule(value) or (inspect.isclass(value) and issubclass(value, Exception | tuple)):
        return
    documented = [value, *(vars(value).values() if inspect.isclass(value) else ())]
    assert any(">>>" in (inspect.getdoc(member) or "") for member in documented), f"{name} has no example"

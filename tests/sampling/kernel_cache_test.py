"""The cache of compiled kernels: what another user, a full disk or a broken compiler leaves there is not run."""

import functools
import logging
import os
import pathlib
import shutil
import stat
import subprocess
import threading
import time

import pytest

from issgd_jax import kernels, paths
from issgd_jax.kernels import native

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C++ compiler: there are no kernels")


@pytest.fixture(scope="module")
def library():
    """The library that this process has compiled, or found."""
    return next(paths.cache_folder().glob(f"{native._stem()}-*.so")).read_bytes()


@pytest.fixture
def home(tmp_path, monkeypatch, library):
    """A home folder of its own, and a compiler that takes no time: it copies the library."""
    (tmp_path / "library").write_bytes(library)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    set_compiler(monkeypatch, tmp_path, f'cp "{tmp_path}/library" "$output"')
    return tmp_path / "home"


def set_compiler(monkeypatch, folder, commands):
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\nfor output; do :; done\n{commands}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -DNAME")


def cache(home):
    return home / ".cache" / "issgd_jax"


def names(home):
    return sorted(path.name for path in cache(home).iterdir())


def build(home):
    folder = paths.private_folder(paths.cache_folder())
    assert folder == cache(home).resolve()
    return native._cached(folder), folder


def test_threads_that_begin_together_load_one_library(home, monkeypatch):
    """Red if both register their own, which XLA refuses."""
    began = threading.Barrier(2)
    loaded = []
    monkeypatch.setattr(native, "_available", functools.cache(lambda: loaded.append(1) or not time.sleep(0.2)))

    def begin():
        began.wait()
        assert native.available()

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1


def check_plain(caplog, *reasons):
    """Plain JAX replaces the kernels, with one warning of one line."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "issgd_jax"):
        assert native._available.__wrapped__() is False
    (record,) = caplog.records
    message = record.getMessage()
    assert "plain JAX replaces them" in message and "\n" not in message and len(message) < 900
    assert all(reason in message for reason in reasons), message


def make_spy(folder, monkeypatch):
    """Returns a real library with all functions, which leaves a file behind as soon as it is loaded; and that file."""
    functions = "".join(f'extern "C" void {name}() {{}}\n' for name in native.FUNCTIONS)
    (folder / "spy.cc").write_text(
        f"#include <cstdio>\n{functions}__attribute__((constructor)) static void run() {{\n"
        f'  std::fclose(std::fopen("{folder}/was_run", "w"));\n}}\n'
    )
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    subprocess.run([compiler, "-shared", "-fPIC", folder / "spy.cc", "-o", folder / "spy.so"], check=True)
    return folder / "spy.so", folder / "was_run"


def test_a_library_is_kept_in_a_folder_of_ones_own_and_found_again(home):
    found, folder = build(home)
    assert found is None and native._compile(folder).keys() == {*native.FUNCTIONS}
    (name,) = names(home)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / name).stat().st_mode) == 0o500
    assert name == f"{native._stem()}-{native._digest(folder / name)}.so"
    assert native._cached(folder).keys() == {*native.FUNCTIONS} and names(home) == [name]


def test_a_folder_that_others_could_read_is_closed(home):
    cache(home).mkdir(parents=True)
    cache(home).chmod(0o755)
    assert stat.S_IMODE(build(home)[1].stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707, 0o1777], ids=oct)
def test_a_library_planted_in_a_folder_that_others_may_write_is_not_run(mode, home, tmp_path, monkeypatch, caplog):
    spy, was_run = make_spy(tmp_path, monkeypatch)
    cache(home).mkdir(parents=True)
    shutil.copy(spy, cache(home) / f"{native._stem()}-{native._digest(spy)}.so")
    assert native._cached(cache(home)) and was_run.exists()  # else the test could not fail
    was_run.unlink()
    cache(home).chmod(mode)
    check_plain(caplog, f"other users can write {cache(home)}", f"chmod go-w {cache(home)}")
    assert not was_run.exists()


def test_a_folder_above_that_others_may_write_is_refused_unless_it_is_sticky(home, monkeypatch, caplog):
    """Red if somebody could exchange the folder itself; or if /tmp is refused."""
    cache(home).mkdir(parents=True)
    for folder in (home, home / ".cache"):
        folder.chmod(0o777)
        check_plain(caplog, f"other users can write {folder}")
        folder.chmod(0o1777)
        assert build(home)[1] == cache(home)
    home.chmod(0o777)
    (home.parent / "link").symlink_to(cache(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent / "link"))  # a way in from elsewhere
    check_plain(caplog, f"other users can write {home}")


@pytest.mark.skipif(os.getuid() != 0, reason="only the administrator can give a file to another user")
def test_what_belongs_to_another_user_is_not_run(home, tmp_path, monkeypatch, caplog):
    spy, was_run = make_spy(tmp_path, monkeypatch)
    _, folder = build(home)
    planted = folder / f"{native._stem()}-{native._digest(spy)}.so"
    shutil.copy(spy, planted)
    os.chown(planted, 12345, 12345)
    assert native._cached(folder) is None and not planted.exists() and not was_run.exists()
    for path in (cache(home), home / ".cache", home):
        os.chown(path, 12345, 12345)
        check_plain(caplog, f"{path} belongs to another user")
        os.chown(path, 0, 0)


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_compiled_again(kept, home, library):
    """Red if it is loaded, which is SIGBUS, or stays."""
    _, folder = build(home)
    native._compile(folder)
    (name,) = names(home)
    for content in (library[: int(kept * len(library)) if isinstance(kept, float) else kept], library[:-1] + b"x"):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        assert native._cached(folder) is None and names(home) == []
        native._compile(folder)
        assert (folder / name).read_bytes() == library


def test_a_library_of_another_machine_or_without_a_function_is_passed_over(home, tmp_path, monkeypatch):
    _, folder = build(home)
    spy, _ = make_spy(tmp_path, monkeypatch)
    monkeypatch.setattr(native, "FUNCTIONS", (*native.FUNCTIONS, "a_new_one"))
    for content in (spy.read_bytes(), b"\x7fELF of another machine"):
        (folder / "new").write_bytes(content)
        (folder / "new").rename(folder / f"{native._stem()}-{native._digest(folder / 'new')}.so")
    assert native._cached(folder) is None and len(names(home)) == 2
    monkeypatch.setattr(native, "FUNCTIONS", native.FUNCTIONS[:-1])
    assert native._cached(folder)


BROKEN = {
    "fails": ("echo first >&2; echo no room left >&2; exit 1", "ended with status 1: first … no room left"),
    "is killed": ("kill -9 $$", "ended with status -9"),
    "writes garbage": ('head -c 5000 /dev/urandom > "$output"', ""),
    "writes text": ('echo text > "$output"', ""),
    "writes nothing": (":", "No such file"),
    "empty file": (': > "$output"', ""),
    "writes a folder": ('mkdir "$output"', "is no file"),
    "writes a pipe": ('mkfifo "$output"', "is no file"),
    "writes a link": ('ln -s /proc/self/exe "$output"', "is no file"),
    "says what is no text": ("printf '\\377\\376\\n\\000' >&2; exit 3", "ended with status 3"),
    "says too much": ("head -c 3000000 /dev/zero >&2; exit 3", "ended with status 3"),
}


@pytest.mark.parametrize(("commands", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_compiler_costs_speed_alone_and_only_while_it_is_broken(
    commands, reason, home, tmp_path, monkeypatch, caplog
):
    set_compiler(monkeypatch, tmp_path, commands)
    check_plain(caplog, reason)
    set_compiler(monkeypatch, tmp_path, f'cp "{tmp_path}/library" "$output"')
    assert native._cached(cache(home)) is None and native._compile(cache(home))
    assert native._cached(cache(home)), names(home)


def test_a_compiler_that_lacks_a_function_is_broken(home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(native, "FUNCTIONS", (*native.FUNCTIONS, "a_new_one"))
    check_plain(caplog, "lacks a function", "a_new_one")
    assert names(home) == []


def test_a_compiler_that_hangs_is_stopped_with_all_that_it_has_started(home, tmp_path, monkeypatch, caplog):
    """Red if the program hangs with it, also where a process of the compiler's keeps its output open."""
    set_compiler(monkeypatch, tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(native, "COMPILE_SECONDS", 1.0)
    began = time.monotonic()
    check_plain(caplog, "was stopped after 1 s")
    assert time.monotonic() - began < 100
    child = pathlib.Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    end = time.monotonic() + 60
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.01)
    set_compiler(monkeypatch, tmp_path, f'cp "{tmp_path}/library" "$output"; sleep 1000 >&2 &')
    assert native._compile(cache(home))  # what outlives the compiler is not waited for


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null", "/dev/null/none"])
def test_a_home_that_cannot_be_written(place, home, monkeypatch, caplog):
    monkeypatch.setenv("HOME", place)
    check_plain(caplog, "cache folder of your own")


def test_a_compiler_that_cannot_be_named(home, monkeypatch, caplog):
    monkeypatch.setenv("CXX", 'g++ "')
    check_plain(caplog, "$CXX is", "No closing quotation")


def test_no_home_at_all(home, monkeypatch, caplog):
    """A user who is in no list of users, and has no HOME: as in some containers."""
    for nowhere in ("", "relative"):
        monkeypatch.setenv("HOME", nowhere)
        check_plain(caplog, "no user has that home folder")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    check_plain(caplog, "no user has that home folder")


def test_what_a_killed_compilation_left_is_removed_when_it_is_old(home):
    _, folder = build(home)
    old, new = (folder / f"{number}.new" for number in (1, 2))
    for path in (old, new):
        path.mkdir()
        (path / "kernels.so").touch()
    os.utime(old, (0, 0))
    native._compile(folder)
    assert not old.exists() and new.exists()

"""Where runs come from, as part of a page: differences of their configs, environments, commands. Imports no jax."""

import shlex
from collections.abc import Iterator, Sequence

from issgd_jax.view import page
from issgd_jax.view.page import Element, tag
from issgd_jax.view.runs import Arm, Run, differences


def origins(runs: Sequence[Run], arms: Sequence[Arm]) -> Iterator[Element]:
    """Yields tables and commands; runs in which they are the same share them."""
    known = [arm for arm in arms if arm.kind]
    if changed := differences(known):
        rows = [(field, *map(str, values)) for field, values in changed.items()]
        yield page.table("Fields of the config in which the arms differ", ("field", *(arm.name for arm in known)), rows)
    elif len(known) == len(arms) and len(runs) > 1:
        yield tag("p", "The configs differ in nothing but the seed.")
    environments: dict[tuple, list[str]] = {}
    for run in runs:
        environments.setdefault(tuple(_environment(run.record)), []).append(run.name)
    for lines, names in environments.items():
        yield page.table(f"Environment of {', '.join(names)}", ("what", "value"), lines or [("all", "not recorded")])
    yield tag("h3", "Commands")
    commands: dict[str, list[str]] = {}
    for run in runs:
        commands.setdefault(_command(run.record), []).append(run.name)
    for command, names in commands.items():
        yield tag("p", ", ".join(names), class_="soft")
        yield tag("pre", command, tabindex="0")


def _environment(record: dict) -> Iterator[tuple[str, str]]:
    """Yields what a record says of versions, devices and commit; anybody may have changed it."""
    versions, devices = (record.get(name) for name in ("versions", "devices"))
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if isinstance(devices, dict):
        for role, kinds in devices.items():
            yield f"devices: {role}", ", ".join(map(str, kinds)) if isinstance(kinds, list) and kinds else "none"
    if record.get("git_commit"):
        yield "commit", str(record["git_commit"])
    if isinstance(record.get("resumed"), list) and record["resumed"]:
        yield "resumed", f"{len(record['resumed'])} time(s)"


def _command(record: dict) -> str:
    command = record.get("command")
    if not isinstance(command, list) or not command:
        return "not recorded"
    program, *arguments = map(str, command)
    # The name of the program is two words.
    return " ".join([program if program.startswith("issgd-jax ") else shlex.quote(program), shlex.join(arguments)])

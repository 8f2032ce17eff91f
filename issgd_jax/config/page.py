"""Fields and columns as text: for `--help`, and as the page docs/config.md."""

import itertools
from collections.abc import Iterator, Mapping

from issgd_jax.config.columns import COLUMNS
from issgd_jax.config.schema import FIELDS, GROUPS, Field

_INTRODUCTION = """\
# Fields of an experiment, columns of its metrics

Generated from the code: `python -m issgd_jax.config > docs/config.md`.

An experiment is a file with a function `get_config` (see `experiments/configs/`), which changes some of these fields.
Without `--config` it is `digits`, whose values `issgd-jax train --help` shows. The command line overrides any of them:
`--config.learner.batch_size=64`. Of a flag that is given twice the last counts; `None` sets a field whose default is
None to it again.

**`--config=FILE.py` and `--config.problem=module:function` EXECUTE Python**: name only files that you would run as a
program. What a run leaves behind (`config.json`, rows of metrics, checkpoints) is read as data and never executed.

Files and folders (`--workdir`, `--config`, `data.dir`, ...) are of this machine and may have any name; `~` is expanded.
A URL such as `gs://bucket/run` is refused: mount the storage, and name the folder.
"""
_COLUMNS = """\
## Columns of metrics.jsonl

One JSON object a line: at step 0, every `eval_every` steps, and at the end. A number that is not finite is `null`. The
TensorBoard events hold the same numbers under the same names, counts as histograms.

`log.writers=wandb,mlflow` sends every row to these libraries too (`pip install 'issgd-jax[wandb]'`,
`'issgd-jax[mlflow]'`), with the config, in a run that has the name of the folder. Their own environment variables say
where: `WANDB_PROJECT`, `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`. A run that is resumed
continues theirs, by the ids in `writers.json`: W&B ignores the rows that it has, MLflow holds them twice. Lists of
numbers are histograms in W&B, and left out of MLflow. A row that a library refuses is tried again and never stops
training. In Python any function `(step, row)` is a writer: `issgd_jax.train(config, workdir, writers=[function])`.
"""


def help_text(values: Mapping[str, object]) -> str:
    """Returns one line for each field, by group: flag, value, documentation.

    Args:
      values: {field: what it is unless it is given}.

    Example:
      >>> print(help_text({field.name: field.default for field in FIELDS}).splitlines()[2])
      --config.seed=0: Seed of the initial parameters and of all draws.
    """
    lines = []
    for title, fields in _groups():
        lines += ["", title]
        lines += [f"--config.{field.name}={values[field.name]}: {field.doc}" for field in fields]
    return "\n".join(lines)


def markdown() -> str:
    """Returns the page docs/config.md."""
    sections = [_INTRODUCTION]
    for title, fields in _groups():
        rows = [(f"`{field.name}`", f"`{_default(field)}`", _allowed(field), field.doc) for field in fields]
        sections.append(f"## {title}\n\n" + _table(("field", "default", "allowed", "meaning"), rows))
    sections.append(_COLUMNS)
    for title, columns in COLUMNS.items():
        described = [(f"`{name}`", meaning) for name, meaning in columns.items()]
        sections.append((f"{title}:\n\n" if title else "") + _table(("column", "meaning"), described))
    return "\n".join(sections)


def _groups() -> Iterator[tuple[str, list[Field]]]:
    """Yields (title, fields) of each group."""
    for group, fields in itertools.groupby(FIELDS, lambda field: field.name.rpartition(".")[0].partition(".")[0]):
        yield f"{group}: {GROUPS[group]}" if group else GROUPS[group], list(fields)


def _default(field: Field) -> str:
    return "None" if field.is_optional else str(field.default)


def _allowed(field: Field) -> str:
    kind = field.type.__name__
    return f"{kind}, {field.limit.text}" if field.limit.text else kind


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

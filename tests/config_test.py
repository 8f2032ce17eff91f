"""One row for each field: a page, a help or a default that says something else turns these red."""

import pathlib
import subprocess
import sys

import pytest

from issgd_jax import InputError, train
from issgd_jax import config as config_lib
from issgd_jax.config import columns, page, schema
from issgd_jax.run import wiring
from tests.helpers import smoke

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_that_of_the_code():
    printed = subprocess.run([sys.executable, "-m", "issgd_jax.config"], capture_output=True, text=True, check=True)
    assert PAGE.read_text() == printed.stdout == page.markdown(), "python -m issgd_jax.config > docs/config.md"


def test_help_page_and_default_have_every_field_once():
    names = [field.name for field in schema.FIELDS]
    assert sorted(names) == list(config_lib.flatten(config_lib.default())) and len(set(names)) == len(names)
    shown = page.help_text({field.name: field.default for field in page.FIELDS})
    for field in schema.FIELDS:
        assert shown.count(f"\n--config.{field.name}=") == 1
        assert page.markdown().count(f"\n| `{field.name}` |") == 1


def test_every_field_is_documented_and_in_a_group_that_stands_together():
    assert all(field.doc.endswith(".") for field in schema.FIELDS)
    titles = [title for title, _ in page._groups()]
    assert len(titles) == len(set(titles)) == len(schema.GROUPS)


def test_the_default_is_valid_and_fresh():
    config_lib.validate(config_lib.default())
    changed = config_lib.default()
    changed.devices.workers, changed.data.dir, changed.model.mlp.hidden_sizes = 3, "x", (1,)
    assert config_lib.default().devices.workers is None and config_lib.default().data.dir is None
    assert config_lib.default().model.mlp.hidden_sizes == (256,) * 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("stride", 5.0)),
        ({"learner.limit": 3.0}, ("stride", 3.0)),
        ({"learner.draw": "stride"}, ("stride", None)),
        ({"learner.draw": "independent"}, ("independent", None)),
        ({"learner.refresh": False}, ("systematic", None)),
        ({"workers.score": "loss"}, ("systematic", None)),
        ({"proposal.name": "uniform"}, ("systematic", None)),
        ({"proposal.when": "auto"}, ("systematic", None)),
        ({"proposal.when": "off"}, ("systematic", None)),
        ({"proposal.name": "proportional"}, ("stride", 5.0)),
        ({"proposal.name": "proportional", "proposal.max_staleness": 10}, ("systematic", None)),
        ({"workers.enabled": False, "learner.asynchronous": 4}, ("stride", 5.0)),
    ],
)
def test_draws_left_to_the_default_are_the_best_that_the_config_allows(changes, expected):
    """Red if a config that cannot have a limit is refused for draws that it did not ask for."""
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    config_lib.validate(config)
    assert config_lib.draw_and_limit(config) == expected
    sampler = wiring.make_sampler(config, 1000)
    assert (sampler.draw_method, sampler.limit) == expected


@pytest.mark.parametrize("field", schema.FIELDS, ids=lambda field: field.name)
def test_a_field_keeps_its_type_and_refuses_another_naming_it(field):
    config = config_lib.default()
    with config.ignore_type():
        config.update_from_flattened_dict({field.name: object()})
    with pytest.raises(InputError, match=f"{field.name} must be of type {field.type.__name__}"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    "field", [field for field in schema.FIELDS if field.type in (int, float)], ids=lambda field: field.name
)
def test_a_number_has_bounds_that_the_error_names(field):
    for value in (field.type(-1), field.type(10**30) * 10):
        config = config_lib.default()
        config.update_from_flattened_dict({field.name: value})
        with pytest.raises(InputError, match=rf"{field.name} must be .*, got .*--config\.{field.name}\)"):
            config_lib.validate(config)


@pytest.mark.parametrize("name", ["proposal.name", "schedule.name", "learner.draw", "workers.score", "model.name"])
def test_a_choice_that_there_is_not_gives_all_that_there_are(name):
    config = config_lib.default()
    config.update_from_flattened_dict({name: "none"})
    with pytest.raises(InputError, match=f"{name} must be one of .*, got 'none'"):
        config_lib.validate(config)


def test_the_page_has_every_column_of_a_run_and_no_other(tmp_path):
    tiny = {"steps": 2, "eval_every": 1, "model__mlp__hidden_sizes": (4,), "checkpoint__every_steps": 0}
    shown = {"log__tensorboard_images": 2, "log__tensorboard": True}
    config = smoke(proposal__when="auto", proposal__cost=0.0, schedule__score_delay=1, **shown, **tiny)
    row = train(config, tmp_path / "auto")[-1]
    assert (
        row.keys() - columns.ON_ACCELERATORS
        == (columns.ALWAYS | columns.WITH_IMPORTANCE_SAMPLING | columns.WITH_IMAGES | columns.WITH_AUTO).keys()
    )
    row = train(smoke(proposal__name="uniform", **tiny), tmp_path / "uniform")[-1]
    assert row.keys() - columns.ON_ACCELERATORS == columns.ALWAYS.keys()
    names = [name for group in columns.COLUMNS.values() for name in group]
    assert len(names) == len(set(names)) and all(page.markdown().count(f"\n| `{name}` |") == 1 for name in names)

"""Fields of an experiment, and the checks of their values."""

from issgd_jax.config.checks import validate as validate
from issgd_jax.config.schema import FIELDS as FIELDS
from issgd_jax.config.schema import check_field as check_field
from issgd_jax.config.schema import default as default
from issgd_jax.config.schema import draw_and_limit as draw_and_limit
from issgd_jax.config.schema import flatten as flatten
from issgd_jax.config.schema import nearest as nearest
from issgd_jax.config.schema import samples_by_importance as samples_by_importance
from issgd_jax.config.schema import with_options as with_options

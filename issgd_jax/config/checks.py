"""Checks of a config: each value by itself, and values that depend on each other."""

import re
from typing import Any

from ml_collections import ConfigDict

from issgd_jax.config.schema import FIELDS, Field, check_field, draw_and_limit, flatten, samples_by_importance
from issgd_jax.errors import InputError

MAX_ROUNDS_IN_FLIGHT = 16
UNIFORM_DRAWS = ("shuffled", "random_subset")


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without data and devices.

    Args:
      config: with the fields of `default`.

    Raises:
      InputError: a field is unknown or missing, or its value cannot work; names field, value, limit and remedy.

    Example:
      >>> from issgd_jax.config import default
      >>> config = default()
      >>> config.learner.batch_size = 0
      >>> validate(config)
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: learner.batch_size must be between 1 and 2,147,483,647, got 0 \
(see --config.learner.batch_size)
    """
    values = flatten(config)
    for name in values:
        check_field(name)
    if missing := {field.name for field in FIELDS} - values.keys():
        raise InputError(
            f"config lacks the field(s) {', '.join(sorted(missing))}: start from issgd_jax.config.default()"
        )
    for field in FIELDS:
        _check_type(field, values[field.name])
    for field in FIELDS:
        _check_limit(field, values[field.name])
    _check_asynchronous(config)
    if samples_by_importance(config):
        _check_scoring(config)
    if config.learner.rate_by_gain and not (samples_by_importance(config) and config.learner.refresh):
        raise InputError(
            "learner.rate_by_gain measures the gain by the gradient norms of minibatches drawn by importance: use "
            "it with --config.learner.refresh=True, and a proposal that is not uniform"
        )
    if config.learner.limit is not None:
        _check_limit_of_norms(config)
    _check_transformer(config.model.transformer)
    if any(value is not None for value in config.distributed.values()):
        _check_distributed(config)


def _check_limit_of_norms(config: ConfigDict) -> None:
    learner = config.learner
    draw, _ = draw_and_limit(config)
    if draw != "stride" or not samples_by_importance(config):
        raise InputError(
            f"learner.limit is {learner.limit}, which visits by importance make up for, but learner.draw is "
            f"{draw}, proposal.name {config.proposal.name} and proposal.when {config.proposal.when}: use "
            "--config.learner.draw=stride and a proposal that is not uniform, or --config.learner.limit=None"
        )
    if not learner.refresh or config.workers.score != "gradient_norm":
        raise InputError(
            f"learner.limit is {learner.limit}, a limit of gradient norms, but learner.refresh is {learner.refresh} "
            f"and workers.score {config.workers.score}: use True and gradient_norm, or --config.learner.limit=None"
        )


def _check_type(field: Field, value: Any) -> None:
    if value is None and field.is_optional:
        return
    if type(value) not in ((int, float) if field.type is float else (field.type,)):
        raise InputError(
            f"{field.name} must be of type {field.type.__name__}{' or None' if field.is_optional else ''}, got "
            f"{value!r} (see --config.{field.name})"
        )


def _check_limit(field: Field, value: Any) -> None:
    if value is not None and not field.limit.allows(value):
        raise InputError(f"{field.name} must be {field.limit.text}, got {value!r} (see --config.{field.name})")


def _check_transformer(transformer: ConfigDict) -> None:
    if transformer.width % transformer.num_heads:
        raise InputError(
            f"model.transformer.width must be a multiple of num_heads, got {transformer.width} "
            f"and {transformer.num_heads}"
        )


def _check_distributed(config: ConfigDict) -> None:
    _check_processes(**config.distributed)
    if not samples_by_importance(config):
        return
    if config.schedule.name == "free_running" and config.workers.enabled:
        raise InputError(
            "schedule.name is free_running, whose scores enter when they are ready, but with --config.distributed they "
            "must enter everywhere at the same step: use relaxed or exact"
        )
    if config.proposal.when == "auto" and config.proposal.cost is None:
        raise InputError(
            "proposal.when is auto and measures the cost of a step, which differs between processes: give it by "
            "--config.proposal.cost, or use --config.proposal.when=on"
        )


def _check_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise InputError(
                f"distributed.coordinator is auto, which finds num_processes and process_id, but they are "
                f"{num_processes} and {process_id}: leave them out, or give host:port"
            )
    elif None in (coordinator, num_processes, process_id) or not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"distributed.coordinator must be host:port of process 0, with num_processes and process_id, or auto, got "
            f"{coordinator!r}, {num_processes} and {process_id} (see --config.distributed)"
        )
    elif process_id >= num_processes:
        raise InputError(f"distributed.process_id must be below num_processes, got {process_id} of {num_processes}")


def _check_asynchronous(config: ConfigDict) -> None:
    learner, sharing = config.learner, config.devices.learners > 1 or config.distributed.coordinator is not None
    least = learner.asynchronous - 1
    if least and sharing:
        raise InputError(
            f"learner.asynchronous is {learner.asynchronous}, learners with a minibatch each, but devices.learners is "
            f"{config.devices.learners} and distributed.coordinator {config.distributed.coordinator}, which share one: "
            "use either"
        )
    if learner.max_gradient_delay is not None and learner.max_gradient_delay < least:
        raise InputError(
            f"learner.max_gradient_delay must be >= learner.asynchronous - 1 = {least}, got "
            f"{learner.max_gradient_delay}: gradients of so many learners are as late on average; raise it, or "
            "lower --config.learner.asynchronous"
        )


def _check_scoring(config: ConfigDict) -> None:
    if config.learner.draw in UNIFORM_DRAWS:
        raise InputError(
            f"learner.draw is {config.learner.draw}, which draws uniformly, but proposal.name is "
            f"{config.proposal.name}: use systematic, or --config.proposal.name=uniform"
        )
    if draw_and_limit(config)[0] == "stride":
        _check_stride(config.proposal)
    if config.workers.enabled:
        if config.schedule.name == "relaxed":
            _check_relaxed(config)
    elif not config.learner.refresh:
        raise InputError(
            f"workers.enabled and learner.refresh are both False: proposal {config.proposal.name} would never see a "
            "score; enable one, or use --config.proposal.name=uniform"
        )
    elif config.schedule.name == "exact":
        raise InputError(
            "schedule.name is exact, which scores all examples before every step, but workers.enabled is False: enable "
            "them, or use --config.schedule.name=relaxed"
        )


def _check_stride(proposal: ConfigDict) -> None:
    if proposal.when == "auto":
        raise InputError(
            "learner.draw is stride and proposal.when auto, which draws uniformly between trials: every visit counts "
            "until the next one; use --config.proposal.when=on, or --config.learner.draw=systematic without a limit"
        )
    if proposal.name == "proportional" and proposal.max_staleness is not None:
        raise InputError(
            f"learner.draw is stride, which visits every example, but proposal.max_staleness is "
            f"{proposal.max_staleness}, which excludes some: use --config.proposal.max_staleness=None, or "
            "--config.learner.draw=systematic without a limit"
        )


def _check_relaxed(config: ConfigDict) -> None:
    """Checks that scores enter during the run, and bounds the copies of the parameters that wait for slow workers."""
    steps_per_round, score_delay = config.schedule.steps_per_round, config.schedule.score_delay
    if score_delay >= config.steps:
        raise InputError(
            f"schedule.score_delay is {score_delay}, but training ends after {config.steps} steps: no score would ever "
            f"enter; lower it"
        )
    if score_delay > MAX_ROUNDS_IN_FLIGHT * steps_per_round:
        raise InputError(
            f"schedule.score_delay must be <= {MAX_ROUNDS_IN_FLIGHT} * steps_per_round, got {score_delay} and "
            f"{steps_per_round}: each round in flight holds a copy of the parameters"
        )

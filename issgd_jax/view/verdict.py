"""Whether importance sampling helped, from the rows of runs. Imports no jax."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from issgd_jax.history import seconds_per_step, steps_of_seeds
from issgd_jax.view.runs import IMPORTANCE, UNIFORM, Arm, differences

LOSS = "train/loss"
# Fields that say what is learned: arms in which they differ are not compared.
_TASK = ("data.", "model.", "problem")
# Ratios nearer to 1 are no difference.
_CLEAR = 1.1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of importance sampling.

    Attributes:
      headline: one sentence.
      facts: sentences with the figures.
    """

    headline: str
    facts: tuple[str, ...]


def verdict(arms: Sequence[Arm]) -> list[Verdict]:
    """Returns a verdict on each arm with importance sampling, beside the best of those with uniform draws.

    Args:
      arms: of all runs.

    Guarantees:
      At least one: where nothing can be compared, it says why.

    Example:
      >>> verdict([])[0].headline
      'Nothing can be compared: no run here samples by importance.'
    """
    sampled, uniform = ([arm for arm in arms if arm.kind == kind] for kind in (IMPORTANCE, UNIFORM))
    if not sampled:
        return [Verdict("Nothing can be compared: no run here samples by importance.", tuple(map(_possible, uniform)))]
    return [_of_arm(arm, uniform) for arm in sampled]


def _of_arm(arm: Arm, uniform: list[Arm]) -> Verdict:
    gain = _gain(arm)
    if not uniform:
        return Verdict(
            f"Nothing can be compared with {arm.name}: no run here draws uniformly.",
            (*gain, "To compare, train the same with --config.proposal.name=uniform, or use issgd-jax compare."),
        )
    alike = [other for other in uniform if _task(other) == _task(arm)]
    if not alike:
        return Verdict(
            f"Nothing can be compared with {arm.name}: the uniform runs here have other data, or another model.", gain
        )
    measured = [other for other in alike if other.last(LOSS)]
    if not measured or not arm.last(LOSS):
        return Verdict(f"Nothing can be compared with {arm.name}: a run has no training loss that is finite.", gain)
    return _beside(arm, min(measured, key=_final_loss), gain)


def _beside(arm: Arm, uniform: Arm, gain: tuple[str, ...]) -> Verdict:
    """Compares two arms of one task."""
    target = _final_loss(uniform)
    needed = steps_of_seeds(target, arm.histories, ends_there=False)
    needed_uniform = steps_of_seeds(target, uniform.histories, ends_there=True)
    steps, steps_uniform = map(statistics.median, (needed, needed_uniform))
    # A loss that is there from the start takes no step.
    fewer = max(steps_uniform, 1) / max(steps, 1)
    seconds, seconds_uniform = steps * _pace(arm), steps_uniform * _pace(uniform)
    faster = seconds_uniform / seconds if seconds > 0 and math.isfinite(seconds_uniform) else float("nan")
    facts = [
        f"Training loss {target:.3g}, at which uniform draws end, took {_number(steps)} steps with {arm.name} "
        f"and {_number(steps_uniform)} with {uniform.name}."
        if math.isfinite(steps)
        else f"Training loss {target:.3g}, at which uniform draws end after {_number(steps_uniform)} steps, was not "
        f"reached in {_last_step(arm):,} steps with {arm.name}."
    ]
    if math.isfinite(seconds) and math.isfinite(seconds_uniform):
        facts.append(
            f"That is {seconds:.3g} seconds beside {seconds_uniform:.3g}, without compilation: a step takes "
            f"{1e3 * _pace(arm):.3g} milliseconds and {1e3 * _pace(uniform):.3g}, on the devices of these runs."
        )
    chance = _chance(arm, uniform, needed, needed_uniform)
    facts += [*_last_errors(arm, uniform), *gain, *chance, *_caveats(arm, uniform)]
    return Verdict(_headline(arm.name, steps, fewer, faster, is_sure=not chance), tuple(facts))


def _headline(name: str, steps: float, fewer: float, faster: float, *, is_sure: bool) -> str:
    subject = name[0].upper() + name[1:]
    if not math.isfinite(steps):
        return f"{subject} did not help: it never reached the training loss at which uniform draws end."
    amounts = [_compared(fewer, "steps", "fewer", "as many")]
    amounts += [] if math.isnan(faster) else [_compared(faster, "time", "less", "as much")]
    helped = "helped" if is_sure else "seems to have helped"
    if fewer >= _CLEAR:
        judgement = f"{helped} in steps, not in time" if faster < _CLEAR else helped
    elif faster >= _CLEAR:
        judgement = f"{helped} in time, not in steps"
    elif min(fewer, faster) > 1 / _CLEAR:
        judgement = "made no difference"
    else:
        judgement = "did not help" if is_sure else "seems not to have helped"
    return f"{subject} {judgement}: it reached the final training loss of uniform draws in {' and '.join(amounts)}."


def _compared(times: float, what: str, less: str, equal: str) -> str:
    """Returns how much of something was needed, where uniform draws needed `times` as much.

    Example:
      >>> _compared(2.0, "steps", "fewer", "as many"), _compared(1.0, "time", "less", "as much")
      ('2.0 times fewer steps', 'as much time')
    """
    if times >= _CLEAR:
        return f"{_times(times)} times {less} {what}"
    return f"{equal} {what}" if times > 1 / _CLEAR else f"{_times(1 / times)} times more {what}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def _last_errors(arm: Arm, uniform: Arm) -> list[str]:
    ours, theirs = arm.last("test/error"), uniform.last("test/error")
    if not ours or not theirs:
        return []
    overlap = max(min(ours), min(theirs)) <= min(max(ours), max(theirs))
    remark = ", no clear difference" if overlap else ""
    return [
        f"Test error at the end: {statistics.median(ours):.2%} with {arm.name}, {statistics.median(theirs):.2%} with "
        f"{uniform.name}{remark}."
    ]


def _chance(arm: Arm, uniform: Arm, needed: list[float], needed_uniform: list[float]) -> list[str]:
    """Returns a sentence where the seeds leave the steps that were needed to chance."""
    if min(len(arm.runs), len(uniform.runs)) == 1:
        return ["An arm has a single seed: chance is not excluded."]
    if max(min(needed), min(needed_uniform)) <= min(max(needed), max(needed_uniform)):
        return ["Some seeds of one arm needed as many steps as some of the other: chance is not excluded."]
    return []


def _caveats(arm: Arm, uniform: Arm) -> list[str]:
    """Returns sentences on what else differs."""
    caveats = []
    fields = differences([arm, uniform])
    if other := [name for name in fields if not name.startswith("proposal.")]:
        values = (f"{name} ({fields[name][0]} and {fields[name][1]})" for name in other)
        caveats.append(f"The arms also differ in {', '.join(values)}.")
    if _last_step(arm) != _last_step(uniform):
        caveats.append(f"They have done {_last_step(arm):,} and {_last_step(uniform):,} steps.")
    return caveats


def _gain(arm: Arm) -> tuple[str, ...]:
    """Returns a sentence on the variance in the second half of an arm, where it was measured."""
    halves = (rows[len(rows) // 2 :] for rows in arm.histories)
    gains = [row["variance/gain"] for rows in halves for row in rows if row.get("variance/gain") is not None]
    if not gains:
        return ()
    gain = statistics.median(gains)
    if gain < 1:
        return (f"The variance of the gradient was {1 / max(gain, 1e-9):.1f} times LARGER than with uniform draws.",)
    batch = arm.essence.get("learner.batch_size")
    size = f": a minibatch of {batch} was worth a uniform one of {gain * batch:,.0f}" if isinstance(batch, int) else ""
    return (
        f"In the second half, the variance of the gradient was {gain:.1f} times smaller than uniform draws have{size}.",
    )


def _possible(arm: Arm) -> str:
    """Returns a sentence on what importance sampling could gain where draws were uniform."""
    roots = [
        row["variance/uniform"] / row["variance/ideal"]
        for rows in arm.histories
        for row in rows[len(rows) // 2 :]
        if row.get("variance/uniform") and row.get("variance/ideal")
    ]
    if not roots:
        return f"{arm.name}: the variance of the gradient was not measured."
    return (
        f"{arm.name}: with ideal importance sampling the variance of the gradient would have been "
        f"{statistics.median(roots) ** 2:.1f} times smaller in the second half."
    )


def _task(arm: Arm) -> dict:
    return {name: value for name, value in arm.essence.items() if name.startswith(_TASK)}


def _final_loss(arm: Arm) -> float:
    return statistics.median(arm.last(LOSS))


def _last_step(arm: Arm) -> int:
    return max(rows[-1]["step"] for rows in arm.histories)


def _pace(arm: Arm) -> float:
    return seconds_per_step(arm.histories)


def _number(steps: float) -> str:
    return f"{steps:,.0f}"

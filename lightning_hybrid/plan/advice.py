"""Which settings make a run smaller, each judged by planning the run again with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_hybrid.config import validate
from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.errors import LightningHybridError
from lightning_hybrid.plan.changes import Change, changes
from lightning_hybrid.plan.phases import Plan, make_plan


@dataclass(frozen=True)
class Advice:
    """A change of settings.

    Attributes:
        overrides: as the command line takes them.
        saved: bytes that the worst phase takes less.
        plan: of the run with the change.
        costs: what of the result the change changes; empty where that stays the same.
    """

    overrides: tuple[str, ...]
    saved: int
    plan: Plan
    costs: tuple[str, ...] = ()


def advise(plan: Plan) -> list[Advice]:
    """Changes that save something, the largest first; last, where no single one is enough, several together.

    Those together leave the result as it is, unless it does not fit without.
    """
    found = [result for change in changes(plan) if (result := _tried(plan, change)) is not None]
    singles = sorted((advice for _, advice in found), key=lambda advice: -advice.saved)
    if plan.fits or any(advice.plan.fits and not advice.costs for advice in singles):
        return singles
    together = _together(plan)
    return singles if together is None else [*singles, together]


def _together(plan: Plan) -> Advice | None:
    """Take, again and again, the change that saves most, until it fits or nothing saves anything.

    What changes the result is taken only where nothing else saves anything.
    """
    current, taken = plan, Change((), ())
    while not current.fits:
        possible = [*changes(current)]
        free = _best(current, [change for change in possible if not change.costs])
        best = free or _best(current, [change for change in possible if change.costs])
        if best is None:
            break
        change, advice = best
        current, taken = advice.plan, taken + change
    return None if len(taken.values) < 2 else Advice(taken.overrides, plan.peak - current.peak, current, taken.costs)


def _best(plan: Plan, possible: list[Change]) -> tuple[Change, Advice] | None:
    tried = [result for change in possible if (result := _tried(plan, change)) is not None]
    return max(tried, key=lambda result: result[1].saved, default=None)


def _tried(plan: Plan, change: Change) -> tuple[Change, Advice] | None:
    """The plan with a change; None where it is not allowed or saves nothing worth saying."""
    values = plan.setup.run.model_dump()
    for key, value in change.values:
        _put(values, key, value)
    try:
        changed = make_plan(validate(PlanRun, values))
    except LightningHybridError:
        return None
    saved = plan.peak - changed.peak
    if saved <= plan.device / 1000:
        return None
    return change, Advice(change.overrides, saved, changed, change.costs)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for part in groups:
        values = values.setdefault(part, {})
    values[name] = value

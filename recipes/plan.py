"""What memory `lightning-hybrid ppo` with the same overrides takes, phase by phase, before anything is built."""

from __future__ import annotations

from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.plan import Plan, advise, make_plan, render


def plan_ppo(run: PlanRun) -> Plan:
    """Print the plan, with advice where it does not fit, and return it."""
    plan = make_plan(run)
    print(render(plan, [] if plan.fits else advise(plan)))
    return plan


if __name__ == "__main__":
    recipe_main("plan", PlanRun, plan_ppo)

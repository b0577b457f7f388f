"""What memory a PPO run takes, from its configuration alone: no model is built, loaded or downloaded."""

from lightning_hybrid.plan.advice import Advice, advise
from lightning_hybrid.plan.held import DEVICE, HOST, Held, Moment
from lightning_hybrid.plan.phases import PHASES, Plan, make_plan
from lightning_hybrid.plan.table import render

__all__ = ["DEVICE", "HOST", "PHASES", "Advice", "Held", "Moment", "Plan", "advise", "make_plan", "render"]

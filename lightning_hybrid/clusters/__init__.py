"""Running a recipe on a cluster: its ranks as workers of Ray Train, servers of its roles as Ray actors."""

from __future__ import annotations

from lightning_hybrid.clusters.environment import RayEnvironment
from lightning_hybrid.clusters.launching import launch

__all__ = ["RayEnvironment", "launch"]

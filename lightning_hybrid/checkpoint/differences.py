"""How a run's configuration differs from the one that a checkpoint was written with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# A run that goes on names its checkpoint, and the one before did not.
OF_EVERY_RESUME = ("ckpt_path",)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs, ``key: before -> now``, in the order of the keys."""
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = sorted((old.keys() | new.keys()) - set(OF_EVERY_RESUME))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

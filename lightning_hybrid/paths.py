"""Where the shipped configurations and recipes are: beside the package in a checkout, inside it when installed.

It imports the standard library only, so that the command line finds a recipe without loading the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """Folder of the Hydra configurations."""
    return _folder("conf")


def recipes_dir() -> Path:
    """Folder of the recipes, one script per command."""
    return _folder("recipes")


def _folder(name: str) -> Path:
    checkout = _PACKAGE.parent
    return checkout / name if (checkout / "pyproject.toml").is_file() else _PACKAGE / "_bundled" / name

"""From a composed configuration to typed settings: interpolations resolved, every problem in one report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_hybrid.settings import Detail, Problem, Settings, find_problems, refuse

if TYPE_CHECKING:
    from omegaconf import DictConfig

SettingsT = TypeVar("SettingsT", bound=Settings)


def validate(schema: type[SettingsT], cfg: DictConfig | Mapping[str, Any]) -> SettingsT:
    """Check a composed configuration and return it as `schema`.

    Args:
        schema: The settings to read, such as `PPORun`.
        cfg: What Hydra composed (its own `hydra` node is left out), or a plain mapping.

    Raises:
        ConfigError: listing all problems: unknown keys, `???` left open, wrong types and ranges, broken rules.
    """
    values, unresolved = _resolve(cfg)
    schema = schema.schema_for(values)
    refuse(find_problems(schema, values, unresolved), "in the configuration")
    return schema.model_validate(values)


def _resolve(cfg: DictConfig | Mapping[str, Any]) -> tuple[dict[str, Any], list[Detail]]:
    """Plain values of `cfg`, and a detail for each key that has none and is left out."""
    from omegaconf import DictConfig

    unresolved: list[Detail] = []
    return _plain(cfg if isinstance(cfg, DictConfig) else _node(cfg), (), unresolved), unresolved


def _node(values: Mapping[str, Any]) -> DictConfig:
    """A plain mapping as OmegaConf has it, which finds misspelt interpolations and what YAML could not hold."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.create(dict(values))
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "the configuration"
        refuse([Problem(key, f"cannot be read: {_first_line(error)}")], "in the configuration")
        raise


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(node: DictConfig, place: tuple[str, ...], unresolved: list[Detail]) -> dict[str, Any]:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    values: dict[str, Any] = {}
    for key in map(str, node):
        here = (*place, key)
        if here == ("hydra",):
            continue
        try:
            value = node[key]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue:
            unresolved.append({"type": "missing", "loc": here})
        except OmegaConfBaseException as error:
            message = f"cannot be resolved: {_first_line(error)}"
            unresolved.append({"type": "unresolved", "loc": here, "msg": message})
        else:
            values[key] = _plain(value, here, unresolved) if isinstance(value, DictConfig) else value
    return values

"""The base of every group of settings: strict fields, rules between fields, and one report of all problems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from lightning_hybrid.errors import ConfigError

Location = tuple[str | int, ...]
Detail = dict[str, Any]
Rule = Callable[[Any], "Problem | None"]

_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?#]*)\?[^\s#]+")


@dataclass(frozen=True)
class Problem:
    """One thing wrong: its dotted key (relative to the group that states the rule), the remedy, the value given."""

    key: str
    remedy: str
    given: str | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.remedy}" if self.given is None else f"{self.key} = {self.given}: {self.remedy}"


class Settings(BaseModel):
    """A group of settings: unknown keys and loosely typed values are refused, `rules` hold between the fields.

    A rule is a function of the settings that returns a `Problem` or None. It is judged whenever the fields that it
    reads are valid, also when others are not, so that one report tells everything.

    Raises:
        ConfigError: with all problems at once, when constructed from wrong values.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, **values: Any) -> None:
        refuse(find_problems(self.schema_for(values), values), f"in {type(self).__name__}")
        super().__init__(**values)

    @classmethod
    def schema_for(cls, values: Mapping[str, Any]) -> type[Self]:
        """What to hold `values` against; a group that comes in kinds decides by them."""
        return cls

    # Nested groups are then validated as fields, under their full key, rather than constructed one by one.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def refuse(problems: list[Problem], where: str) -> None:
    """Raise one `ConfigError` that lists all problems; do nothing when there are none."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = (f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        report = "\n".join([f"{count} {where}:", *lines])
        raise ConfigError(report.encode(errors="backslashreplace").decode())  # half a surrogate pair cannot be printed


def find_problems(schema: type[BaseModel], values: Mapping[str, Any], known: Sequence[Detail] = ()) -> list[Problem]:
    """All problems of `values` under `schema`: unknown keys, missing and wrong values, and broken rules.

    `known` are details, in pydantic's form, of values that were found wrong before and are left out of `values`.
    """
    details = list(known)
    try:
        schema.model_validate(dict(values))
    except ValidationError as error:
        details += [dict(detail) for detail in error.errors(include_url=False)]
    wrong: dict[tuple[str, ...], list[Detail]] = {}
    for detail in details:
        wrong.setdefault(_field_path(schema, detail["loc"]), []).append(detail)
    problems = [_explain(schema, path, details) for path, details in wrong.items()]
    if () in wrong:  # nothing was judged, so there is no telling which values the rules could read
        return problems
    return problems + list(_broken_rules(_readable(schema, values, set(wrong)), ""))


def _field_path(schema: type[BaseModel], location: Location) -> tuple[str, ...]:
    """The part of pydantic's location that names keys; what follows are branches of a union and list positions."""
    path: list[str] = []
    current: Any = schema
    for part in location:
        path.append(str(part))
        current = _inside(current, str(part))
        if _group(current) is None and _named_groups(current) is None:
            break
    return tuple(path)


def _inside(annotation: Any, key: str) -> Any:
    """The annotation of what stands under a key: of a group's field, or of one of several groups with names."""
    group = _group(annotation)
    if group is None:
        return _named_groups(annotation)
    field = group.model_fields.get(key)
    return field.annotation if field else None


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field holds, also one that may be null; None for other values."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    alone = kinds[0] if len(kinds) == 1 and get_origin(annotation) not in (list, tuple) else None
    return alone if isinstance(alone, type) and issubclass(alone, BaseModel) else None


def _named_groups(annotation: Any) -> type[BaseModel] | None:
    """The group of which a field holds several by name, `dict[str, Group]`; None for other fields."""
    return _group(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def _explain(schema: type[BaseModel], path: tuple[str, ...], details: list[Detail]) -> Problem:
    key, first = ".".join(path) or "a key", details[0]  # of a key that is no proper text, pydantic gives no place
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "unresolved":
        return Problem(place, first["msg"])
    if first["type"] == "missing":
        return Problem(place, f"required, but not given{_purpose(schema, path)}")
    if first["type"] == "extra_forbidden":
        return Problem(key, f"unknown key. {_suggest(schema, path)}", _show(first["input"]))
    allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details)).replace(" or be ", " or ")
    item = next((f" (item {part})" for part in first["loc"][len(path) :] if isinstance(part, int)), "")
    return Problem(key + item, f"must {allowed}{_purpose(schema, path)}", _show(first["input"]))


def _allowed(detail: Detail) -> str:
    """Pydantic's "Input should be greater than 0" without its subject, to follow "must"."""
    message = str(detail["msg"])
    return message.partition(" should ")[2] or f"satisfy: {message}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _owner(schema: type[BaseModel], path: tuple[str, ...]) -> type[BaseModel]:
    """The group in which the last key of `path` stands."""
    current: Any = schema
    for part in path[:-1]:
        current = _inside(current, part)
        schema = _group(current) or schema
    return schema


def _purpose(schema: type[BaseModel], path: tuple[str, ...]) -> str:
    """What the field is for, from its docstring, in brackets."""
    field = _owner(schema, path).model_fields.get(path[-1]) if path else None
    return f" ({' '.join(field.description.split())})" if field and field.description else ""


def _suggest(schema: type[BaseModel], path: tuple[str, ...]) -> str:
    """The key that was probably meant: a similar one of the same group, or the same one of another group."""
    siblings = list(_owner(schema, path).model_fields)
    close = difflib.get_close_matches(path[-1], siblings, n=1)
    elsewhere = [key for key in _keys(schema) if key.split(".")[-1] == path[-1]]
    if close or elsewhere:
        return "Did you mean " + " or ".join(f"'{key}'" for key in close or elsewhere) + "?"
    return f"Known keys here: {', '.join(siblings)}"


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        group = _group(field.annotation)
        if group:
            yield from _keys(group, f"{prefix}{name}.")


def _readable(schema: type[BaseModel], values: Mapping[str, Any], wrong: set[tuple[str, ...]]) -> BaseModel:
    """The settings with every wrong value left out: reading one raises AttributeError."""
    known = {name: values[name] for name in schema.model_fields if name in values}
    for name, value in known.items():
        annotation = schema.model_fields[name].annotation
        group, named = _group(annotation), _named_groups(annotation)
        inside = {path[1:] for path in wrong if path[0] == name and len(path) > 1}
        if group and isinstance(value, Mapping):
            known[name] = _readable(group, value, inside)
        elif named and isinstance(value, Mapping):
            known[name] = {
                key: _readable(named, item, {path[1:] for path in inside if path[0] == key and len(path) > 1})
                for key, item in value.items()
                if isinstance(item, Mapping) and (key,) not in inside
            }
    view = schema.model_construct(**known)
    for path in wrong:
        if len(path) == 1:
            view.__dict__.pop(path[0], None)
    return view


def _broken_rules(view: BaseModel, prefix: str) -> Iterator[Problem]:
    for rule in getattr(view, "rules", ()):
        try:
            problem = rule(view)
        except AttributeError:  # it reads a value that is itself wrong, and reported as such
            continue
        if problem:
            yield replace(problem, key=prefix + problem.key)
    for name, value in view.__dict__.items():
        named = value.items() if isinstance(value, dict) else ()
        for key, group in ((name, value), *((f"{name}.{key}", item) for key, item in named)):
            if isinstance(group, BaseModel):
                yield from _broken_rules(group, f"{prefix}{key}.")


def without_credentials(value: Any) -> Any:
    """What may be shown to others of settings, or of a text: an address loses its user, password and query.

    Args:
        value: a text, or mappings and lists with texts in them; anything else is as it was.
    """
    if isinstance(value, Mapping):
        return {name: without_credentials(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(inner) for inner in value]
    return _QUERY.sub(r"\1?…", _USER.sub("…@", value)) if isinstance(value, str) else value

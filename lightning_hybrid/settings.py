"""The base of every group of settings: strict fields, rules between fields, and one report of all problems."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lightning_hybrid.errors import ConfigError

Location = tuple[str | int, ...]
Detail = dict[str, Any]
Rule = Callable[[Any], "Problem | None"]


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

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self, **values: Any) -> None:
        refuse(find_problems(type(self), values), f"in {type(self).__name__}")
        super().__init__(**values)

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
    current: type[BaseModel] | None = schema
    for part in location:
        if current is None:
            break
        path.append(str(part))
        field = current.model_fields.get(str(part))
        current = _group(field.annotation) if field else None
    return tuple(path)


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field holds, or None for a plain value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


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
    for part in path[:-1]:
        schema = _group(schema.model_fields[part].annotation) or schema
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
        group = _group(schema.model_fields[name].annotation)
        if group and isinstance(value, Mapping):
            inside = {path[1:] for path in wrong if path[0] == name and len(path) > 1}
            known[name] = _readable(group, value, inside)
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
        if isinstance(value, BaseModel):
            yield from _broken_rules(value, f"{prefix}{name}.")

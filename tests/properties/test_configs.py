"""Any configuration is settings or one report of all its problems."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lightning_hybrid.config import PPORun, RewardRun, SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.config.validate import validate
from tests.properties import inputs
from tests.properties.cases import cases, success_or_our_own_error

ESSENTIAL: dict[str, Any] = {
    "model": {"path": "a-model"},
    "data": {"path": "rows.jsonl"},
    "trainer": {"max_steps": 10},
    "output_dir": "here",
}
GOOD = {
    PPORun: PPORun(**(ESSENTIAL | {"reward": {"path": "a-reward-model"}})),
    SFTRun: SFTRun(**ESSENTIAL),
    RewardRun: RewardRun(**ESSENTIAL),
}
REFERENCES = [
    "???",
    "${seed}",
    "${data}",
    "${root}/x",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH}",
    "${no.such}",
    "${",
    "${}",
]
REFERENCES += ["${.path}", "${..root}", "${...}", "${no_such_resolver:1}", "\\${root}", "$", "${oc.decode:'['}", "${[}"]

values = st.one_of(
    inputs.json_values,
    st.sampled_from(REFERENCES),
    st.lists(st.sampled_from(REFERENCES), max_size=3),
    st.dictionaries(st.sampled_from(["path", "stage", "a.b"]), st.sampled_from(REFERENCES), max_size=3),
)
odd_values = st.sampled_from(
    [
        b"bytes",
        (1, 2),
        {1, 2},
        1j,
        object(),
        Path("x"),
        print,
        {1: 2, None: 4},
        {(1, 2): 3},
        [object()],
        {"a": print},
    ]
)
odd_keys = st.one_of(inputs.texts, st.sampled_from(["", ".", "a.b", "${seed}", "???", 1, True, None, 1.5, b"b", (1,)]))


def places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each key of nested dictionaries."""
    if not isinstance(tree, dict):
        return []
    return [found for key in tree for found in ((*place, key), *places(tree[key], (*place, key)))]


def dumped(settings: Any) -> dict[str, Any]:
    return settings.model_dump(mode="json")  # lists in place of tuples, as YAML has them


@st.composite
def nearly_right(draw: st.DrawFn, values: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> tuple[Any, Any]:
    """A recipe's settings with some of them replaced, taken out, put elsewhere or put beside others."""
    schema = draw(st.sampled_from(list(GOOD)))
    tree = dumped(GOOD[schema]) if draw(st.booleans()) else copy.deepcopy(ESSENTIAL)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 5]))):
        *way, key = draw(st.sampled_from(places(tree)))
        group = tree
        for part in way:
            group = group[part]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])):
            case "replace":
                group[key] = draw(values)
            case "remove":
                del group[key]
            case "rename":
                group[draw(keys)] = group.pop(key)
            case "add":
                group[draw(keys)] = draw(values)
        if not places(tree):
            break
    return schema, tree


right = st.sampled_from(list(GOOD)).map(lambda schema: (schema, dumped(GOOD[schema])))
trees = st.one_of(
    nearly_right(values, inputs.texts),
    nearly_right(values, inputs.texts),
    nearly_right(st.one_of(values, odd_values), odd_keys),
    st.tuples(st.sampled_from(list(GOOD)), st.dictionaries(inputs.texts, inputs.json_values, max_size=5)),
    right,
)


@cases(trees, few=40, many=1500)
def test_configurations_are_settings_or_refused(case: tuple[Any, dict[Any, Any]], folder: Path) -> None:
    schema, tree = case
    with success_or_our_own_error():
        assert isinstance(validate(schema, tree), schema)


@cases(nearly_right(st.one_of(values, odd_values), inputs.texts), few=20, many=300)
def test_settings_made_in_python_are_settings_or_refused(case: tuple[Any, dict[str, Any]], folder: Path) -> None:
    schema, tree = case
    with success_or_our_own_error():
        assert isinstance(schema(**tree), schema)


names = st.sampled_from([".".join(place) for place in places(dumped(GOOD[PPORun])) if len(place) > 1])
typed = st.text(st.characters(codec="utf-8"), max_size=20)  # what a shell may hand over
YAML = ["null", "true", "[1,2]", "{a: 1}", "'x'", "[", "{", "'", "a b", "a,b"]
written_values = st.one_of(inputs.numbers.map(str), st.sampled_from([*REFERENCES, *YAML]), typed)
overrides = st.builds(
    lambda sign, key, value: f"{sign}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    names,
    written_values,
)
NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


@cases(st.lists(st.one_of(overrides, overrides, overrides, typed), max_size=3), few=6, many=100)
def test_overrides_are_settings_or_refused(case: list[str], folder: Path) -> None:
    with success_or_our_own_error():
        assert isinstance(compose_run("ppo", PPORun, [*NEEDED, *case]), PPORun)

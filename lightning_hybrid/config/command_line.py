"""The command line of a recipe, for as long as nothing of the package is needed: standard library and Hydra only.

The command `lightning-hybrid` loads this file by itself, so that help, `--cfg`, `--info` and shell completion answer
before torch and lightning are loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace

HYDRA_VERSION = "1.3"
_PLAIN_OVERRIDE = re.compile(r"^([A-Za-z_][\w.]*)=")
_GROUP_OVERRIDE = re.compile(r"^\+{0,2}([A-Za-z_][\w/]*)(@[\w.]+)?=")
_SENTENCE = re.compile(r".+?(?<!\bal)(?<!\bDr)\.(?= |$)")
# What makes Hydra know a launcher or sweeper: a module, and the package on PyPI that brings it.
_PLUGINS = {
    "hydra/launcher": {
        "basic": ("hydra", "hydra-core"),
        "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher"),
        "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
        "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    },
    "hydra/sweeper": {"basic": ("hydra", "hydra-core"), "optuna": ("optuna", "optuna")},
}
_NAMED = re.compile(r"^name: ", re.MULTILINE)  # as PPO's algorithms are
_MEMORY_PLAN = "plan"  # takes what ppo takes
_ONLINE = "ppo"


def prepare(arguments: Sequence[str], conf: Path) -> list[str]:
    """The arguments as Hydra should have them: an unknown key passes, and is reported by validation with all others."""
    options = _options(arguments)
    if options.shell_completion:
        return list(arguments)
    others = [*arguments]
    for override in options.overrides:
        others.remove(override)
    return [*(force(override, conf) for override in options.overrides), *others]  # Hydra wants them apart


def force(override: str, conf: Path) -> str:
    """Let an unknown key through composition; choices of a group, Hydra's own keys and options are left as they are."""
    match = _PLAIN_OVERRIDE.match(override)
    if match is None or match[1].split(".")[0] == "hydra" or (conf / match[1]).is_dir():
        return override
    return f"++{override}"


def find_problem(config_name: str, arguments: Sequence[str], conf: Path) -> str | None:
    """A choice that a recipe has not, or a plugin of Hydra that is not installed, and what to do; None if neither."""
    options = _options(arguments)
    if options.config_dir or options.config_path or any(text.startswith("hydra.searchpath=") for text in arguments):
        return None  # there may be other choices
    for override in options.overrides:
        match = _GROUP_OVERRIDE.match(override)
        if match and match[1] in _PLUGINS:
            problem = _missing_plugin(match[1], override.partition("=")[2])
        elif match and (conf / match[1]).is_dir():
            values = _values(override)
            problem = _missing_choice(match[1], values, conf) or _foreign_choice(config_name, match[1], values, conf)
        else:
            continue
        if problem:
            return problem
    return None


def shows_only(arguments: Sequence[str]) -> bool:
    """Whether Hydra answers these arguments, and nothing is run."""
    options = _options(arguments)
    asked = (options.help, options.hydra_help, options.cfg, options.info, options.shell_completion, options.resolve)
    return any(asked)


def show(config_name: str, arguments: Sequence[str], conf: Path) -> None:
    """Print help, configuration, Hydra's information or completions of a recipe.

    Raises:
        SystemExit: with code 2 after a message, when the arguments cannot be composed or contradict each other.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    completions = _completed_choices(config_name, arguments, conf)
    if completions:
        sys.stdout.write(" ".join(completions) + "\n")
        return
    sys.argv = [sys.argv[0], *_with_what_hydra_refers_to(prepare(arguments, conf))]
    register_help(config_name, conf)
    try:
        hydra.main(version_base=HYDRA_VERSION, config_path=str(conf), config_name=config_name)(_do_nothing)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        sys.stderr.write(f"error: {find_problem(config_name, arguments, conf) or error}\n")
        sys.exit(2)


def register_help(config_name: str, conf: Path) -> None:
    """Offer `conf/hydra/help/recipe.yaml` what it says about a recipe and its choices."""
    from omegaconf import OmegaConf

    texts = {"purpose": lambda: purpose(conf / f"{config_name}.yaml"), "choices": lambda: _groups(config_name, conf)}
    for name, text in texts.items():
        OmegaConf.register_new_resolver(f"recipe.{name}", lambda text=text: text().replace("$", "$$"), replace=True)


def purpose(file: Path) -> str:
    """The first sentence of the comment that a YAML file begins with."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    text = " ".join(comment)
    sentence = _SENTENCE.match(text)
    return sentence[0] if sentence else text


def choices_of(group: str, conf: Path) -> list[str]:
    """The choices of a group; what they have in common stands in folders `base`, which are none."""
    files = (file.relative_to(conf / group).with_suffix("") for file in (conf / group).rglob("*.yaml"))
    return sorted(file.as_posix() for file in files if "base" not in file.parts)


def _options(arguments: Sequence[str]) -> Namespace:
    """The arguments as Hydra's own parser reads them."""
    from hydra._internal.utils import get_args_parser

    options: Namespace = get_args_parser().parse_intermixed_args(list(arguments))
    return options


def _completed_choices(config_name: str, arguments: Sequence[str], conf: Path) -> list[str]:
    """Completions of `group=`, where Hydra knows no choices in folders; none for another request."""
    if not _options(arguments).shell_completion or "query=bash" not in arguments:
        return []
    word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
    match = _GROUP_OVERRIDE.match(word)
    if match is None or not (conf / match[1]).is_dir():
        return []
    return [match[0] + choice for choice in _choices_for(config_name, match[1], conf)]


def _with_what_hydra_refers_to(arguments: list[str]) -> list[str]:
    """`--cfg hydra --resolve` as a part of everything: alone, it lacks the `output_dir` that its folders refer to."""
    options = _options(arguments)
    if options.cfg != "hydra" or not options.resolve:
        return arguments
    package = "hydra" if options.package is None else f"hydra.{options.package.removeprefix('hydra.')}"
    return [*options.overrides, "--cfg", "all", "--resolve", "--package", package]


def _do_nothing(cfg: object) -> None:
    """In place of a recipe that is not run."""


def _missing_plugin(group: str, choice: str) -> str | None:
    known = _PLUGINS[group]
    if choice not in known:
        close = difflib.get_close_matches(choice, known, n=1)
        return f"{group}={choice}: no such choice. Did you mean '{close[0]}'?" if close else None
    module, package = known[choice]
    if _is_there(module):
        return None
    return f'{group}={choice} needs the package {package}: pip install "lightning-hybrid[sweep]"'


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would stand in
        return False


def _missing_choice(group: str, values: Iterable[str], conf: Path) -> str | None:
    known = choices_of(group, conf)
    for value in values:
        if not (conf / group / f"{value}.yaml").is_file():
            close = [choice for choice in known if choice.endswith(f"/{value}")]
            close = close or difflib.get_close_matches(value, known, n=1)
            meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            return f"{group}={value}: no such choice.{meant} There are: {', '.join(known)}"
    return None


def _foreign_choice(config_name: str, group: str, values: Iterable[str], conf: Path) -> str | None:
    """What to say about an algorithm or experiment of another recipe; None for one that does not say whose it is."""
    own = _choices_for(config_name, group, conf)
    if group not in ("algorithm", "experiment") or not own:
        return None
    for value in values:
        recipe = _recipe_of(value, conf)
        known = recipe != _ONLINE or _NAMED.search((conf / group / f"{value}.yaml").read_text(encoding="utf-8"))
        if known and value not in own:
            return (
                f"{group}={value} is for lightning-hybrid {recipe}, not for {config_name}, which has: {', '.join(own)}"
            )
    return None


def _values(override: str) -> list[str]:
    """The choices that an override names, several in a sweep; none where it names null or a pattern."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:  # Hydra says best what is wrong with it
        return []
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [str(value) for value in values if isinstance(value, str) and value]


def _groups(config_name: str, conf: Path) -> str:
    """The groups of a recipe, each with its choices and what they are for."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices
    groups = [group for group in chosen if (conf / group).is_dir() and not group.startswith("hydra/")]
    return "\n\n".join(_group(group, chosen[group], config_name, conf) for group in reversed(groups))


def _group(group: str, chosen: str | None, config_name: str, conf: Path) -> str:
    choices = _choices_for(config_name, group, conf)
    width = max(map(len, choices), default=0)
    lines = (f"  {choice:<{width}}  {purpose(conf / group / f'{choice}.yaml')}" for choice in choices)
    return "\n".join([f"{group}={chosen or 'null'}", *lines])


def _choices_for(config_name: str, group: str, conf: Path) -> list[str]:
    """The choices of a group that a recipe may take."""
    choices = choices_of(group, conf)
    if group not in ("algorithm", "experiment"):
        return choices
    recipe = _ONLINE if config_name == _MEMORY_PLAN else config_name
    return [choice for choice in choices if _recipe_of(choice, conf) == recipe]


def _recipe_of(choice: str, conf: Path) -> str:
    """Algorithms and experiments are named after their recipe, or are PPO's."""
    name = choice.rpartition("/")[2]
    return name if (conf / f"{name}.yaml").is_file() else _ONLINE

"""The command `lightning-hybrid`: runs a recipe with Hydra overrides.

It stands beside the package, not in it, so that `--help` answers before torch and lightning are loaded.
"""

from __future__ import annotations

import difflib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "quickstart": "all three stages on a built-in task, then a report; needs no data and no network",
    "sft": "supervised fine-tuning of a model on texts or on prompts with responses",
    "reward": "a reward model from preferences",
    "ppo": "train a policy against a reward model or a Python function",
    "plan": "what memory ppo with the same settings takes, and which settings make it fit",
}

_HELP = """usage: lightning-hybrid COMMAND [key=value ...] [-m] [--cfg job] [--help]

commands:
{commands}

examples:
  lightning-hybrid quickstart
  lightning-hybrid ppo experiment=movie_sentiment/ppo algorithm.kl_coef=0.02
  lightning-hybrid ppo experiment=movie_sentiment/ppo algorithm.kl_coef=0.01,0.05 -m    one run for each value
  lightning-hybrid plan experiment=movie_sentiment/ppo                                  its memory, before it starts
  lightning-hybrid ppo --help                                                           all settings and choices
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe named by the first argument with the others as its overrides.

    Raises:
        SystemExit: with code 0 after help, 2 when there is no such command, or the recipe's own code.
    """
    command, *overrides = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        sys.exit(0)
    if command not in COMMANDS:
        sys.stderr.write(f"error: no command '{command}'.{_suggestion(command)} See lightning-hybrid --help\n")
        sys.exit(2)
    _run(_recipes_dir() / f"{command}.py", overrides)


def _help() -> str:
    return _HELP.format(commands="\n".join(f"  {name:<11} {purpose}" for name, purpose in COMMANDS.items()))


def _suggestion(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(COMMANDS)}."


def _recipes_dir() -> Path:
    """The folder of the recipes, asked of the package's `paths.py` without importing the package."""
    package = importlib.util.find_spec("lightning_hybrid")
    if package is None or not package.submodule_search_locations:
        sys.exit("error: the package lightning_hybrid is not installed: pip install lightning-hybrid")
    paths = runpy.run_path(str(Path(package.submodule_search_locations[0]) / "paths.py"))
    return Path(paths["recipes_dir"]())


def _run(recipe: Path, overrides: Sequence[str]) -> None:
    """Run a recipe as `python recipe.py overrides` would."""
    sys.argv = [str(recipe), *overrides]
    sys.path.insert(0, str(recipe.parent))
    sys.path.append(str(Path.cwd()))  # a reward function may stand in the folder the command is given in
    runpy.run_path(str(recipe), run_name="__main__")


if __name__ == "__main__":
    main()

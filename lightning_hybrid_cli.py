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
from typing import Any

COMMANDS = {
    "quickstart": "all three stages on a built-in task, then a report; needs no data and no network",
    "sft": "supervised fine-tuning of a model on texts or on prompts with responses",
    "reward": "a reward model from preferences",
    "dpo": "train a policy on pairs of responses, without sampling: DPO, IPO, hinge, with or without a reference",
    "kto": "train a policy on responses that are good or bad, without pairs and without sampling",
    "ppo": "train a policy against a reward model or a Python function",
    "export": "a Hugging Face folder from a checkpoint, or from an adapter and its base",
    "inspect": "what a tokenizer makes of data: schema, counts, lengths, samples with their masks",
    "plan": "what memory ppo with the same settings takes, and which settings make it fit",
    "compare": "runs beside each other: settings that differ, metrics, curves, samples; takes the runs' folders",
    "doctor": "what of this machine and environment would stop a run, and what to do about it; takes --json",
    "summary": "one table and one picture of the runs below a folder, such as a sweep done in pieces",
}
# A recipe called inspect.py would hide Python's own module of that name from every recipe beside it.
FILES = {"inspect": "inspect_data"}

_HELP = """usage: lightning-hybrid COMMAND [key=value ...] [-m] [--cfg job] [--help]

commands:
{commands}

examples:
  lightning-hybrid quickstart
  lightning-hybrid ppo experiment=movie_sentiment/ppo algorithm.kl_coef=0.02
  lightning-hybrid ppo experiment=movie_sentiment/ppo algorithm.kl_coef=0.01,0.05 -m    one run for each value
  lightning-hybrid plan experiment=movie_sentiment/ppo                                  its memory, before it starts
  lightning-hybrid compare outputs/movie_sentiment/ppo outputs/movie_sentiment/grpo     two runs beside each other
  lightning-hybrid ppo --help                                                           all settings and choices
  eval "$(lightning-hybrid completion)"                                                 bash completes all of them
"""

# Bash replaces the part of a word behind the last of COMP_WORDBREAKS only, which "=" and "@" are among.
_COMPLETION = r"""_lightning_hybrid_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" words word choices choice
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    if (( ${#words[@]} <= 2 )); then
        choices="COMMANDS"
    else
        choices=$(COMP_LINE="${line#*[[:space:]]}" "${words[0]}" "${words[1]}" -sc query=bash 2> /dev/null)
    fi
    read -rd "" -a choices <<< "$choices"
    COMPREPLY=()
    for choice in "${choices[@]}"; do
        [[ "$choice" == "$word"* ]] && COMPREPLY+=("${choice#"${word%"${word##*["$COMP_WORDBREAKS"]}"}"}")
    done
    [[ "${#COMPREPLY[@]}" == 1 && "${COMPREPLY[0]}" != *[=./] ]] && compopt +o nospace
}
complete -o nospace -o default -F _lightning_hybrid_completion lightning-hybrid
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
    if command == "completion" or "-sc" in overrides and "install=bash" in overrides:
        sys.stdout.write(_COMPLETION.replace("COMMANDS", " ".join(COMMANDS)))
        sys.exit(0)
    if command not in COMMANDS:
        sys.stderr.write(f"error: no command '{command}'.{_suggestion(command)} See lightning-hybrid --help\n")
        sys.exit(2)
    if not _answered(command, overrides):
        _run(_recipes_dir() / f"{FILES.get(command, command)}.py", overrides)


def _help() -> str:
    return _HELP.format(commands="\n".join(f"  {name:<11} {purpose}" for name, purpose in COMMANDS.items()))


def _suggestion(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(COMMANDS)}."


def _answered(command: str, arguments: Sequence[str]) -> bool:
    """Refuse or answer what needs no recipe, such as `--help`, `--cfg job` and completions; False to run the recipe."""
    conf = Path(_part("paths.py")["conf_dir"]())
    if not (conf / f"{command}.yaml").is_file():
        return False
    line = _part("config/command_line.py")
    if line["shows_only"](arguments):
        line["show"](command, arguments, conf)
        return True
    problem = line["find_problem"](command, arguments, conf)
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
    return False


def _recipes_dir() -> Path:
    """The folder of the recipes."""
    return Path(_part("paths.py")["recipes_dir"]())


def _part(file: str) -> dict[str, Any]:
    """What a file of the package defines, without importing the package."""
    package = importlib.util.find_spec("lightning_hybrid")
    if package is None or not package.submodule_search_locations:
        sys.exit("error: the package lightning_hybrid is not installed: pip install lightning-hybrid")
    return runpy.run_path(str(Path(package.submodule_search_locations[0]) / file))


def _run(recipe: Path, overrides: Sequence[str]) -> None:
    """Run a recipe as `python recipe.py overrides` would."""
    sys.argv = [str(recipe), *overrides]
    sys.path.insert(0, str(recipe.parent))
    sys.path.append(str(Path.cwd()))  # a reward function may stand in the folder the command is given in
    runpy.run_path(str(recipe), run_name="__main__")


if __name__ == "__main__":
    main()

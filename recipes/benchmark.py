"""Generation and training beside their peers: one run, same weights, same prompts, same sampling.

``rollout``: tokens per second, memory and switches of the native engine beside Hugging Face's ``generate``, DeepSpeed's
``HybridEngineRollout``, transformers' ``generate_batch``, the rollout of TRL's GRPO, and vLLM where it is installed.
``step``: a PPO step beside a step of TRL's GRPO. ``all``: both. ``strategy``: what the strategy costs beside the same
two engines driven by hand. ``ppo``: the native backend beside vLLM inside PPO on the same prompts, for ZeRO stages and
numbers of ranks, each in processes of its own; and a push of all weights beside OpenRLHF's order, parameter by
parameter. Each peer is a file in ``peers/``; one that is not installed is named as absent (``pip install trl``,
``pip install vllm``). A table is printed, and drawn as a PNG; ``ppo`` writes all figures as JSON beside it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from pathlib import Path

import lightning as L
import torch
from peers import backends
from peers.backends import BACKENDS, compare_backends, loads, panels_of, print_backends
from peers.cell import Cell
from peers.measure import copy_bandwidth
from peers.report import FOOTNOTES, RANDOM_WEIGHTS, Panel, draw, print_rollouts, print_steps, rollout_panel
from peers.rounds import compare, enter_peers
from peers.steps import take_turns
from peers.subject import SHAPES, Source, Subject, device

from lightning_hybrid.engines import prepare_deepspeed

MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "tinystories-656k"


def rollout(options: argparse.Namespace) -> list[Panel]:
    """Print a table for each size."""
    subject = Subject(_source(options))
    entries = enter_peers(subject)
    bandwidth = copy_bandwidth(subject.device) if subject.device.type == "cuda" else None
    panels = []
    for count, max_new_tokens in options.sizes:
        workload = subject.source.workload(count, max_new_tokens, subject.policy)
        title = f"{subject.source}: {workload}"
        print(f"\n{title}, {_where(options)}, medians of rounds: {options.rounds}")
        measured = compare(entries, workload, options.rounds, options.all)
        print_rollouts(measured, workload, bandwidth)
        panels.append(rollout_panel(measured, title))
    print(f"\n{FOOTNOTES}")
    if subject.source.path is None:
        print(RANDOM_WEIGHTS)
    if bandwidth is not None:
        print(f"roofline         time to read weights and live cache at {bandwidth / 1e9:,.0f} GB/s, the measured copy")
    return panels


def step(options: argparse.Namespace) -> list[Panel]:
    """Print the seconds of a whole training step beside TRL's."""
    from peers.ppo import PPOSteps
    from peers.trl_grpo import GRPOSteps

    source = _source(options)
    count, max_new_tokens = options.step_size
    workload = source.workload(count, max_new_tokens, source.policy())
    title = f"{source}: one step on {count} responses of up to {max_new_tokens} tokens"
    print(f"\n{title}, {options.per_prompt} per prompt, {_where(options)}, medians of rounds: {options.rounds}")
    runs = [run for run in (PPOSteps(), GRPOSteps()) if run.absent() is None]
    taken = take_turns(runs, source, workload, options.per_prompt, options.steps, options.rounds)
    print_steps(taken)
    if reason := GRPOSteps.absent():
        print(f"{GRPOSteps.name}: absent: {reason}")
    print("PPO also runs a frozen reference and trains a critic; GRPO, by TRL's default, has neither.")
    return [Panel(title, "seconds per step", tuple((steps.name, steps.seconds) for steps in taken))]


def strategy(options: argparse.Namespace) -> None:
    """Print the median seconds of an iteration of two engines for each ZeRO stage, and the median of the ratios."""
    from peers.by_hand import by_hand, through_the_trainer

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it; a single process stands for one launched
    L.seed_everything(0, verbose=False)
    batches = torch.randint(0, SHAPES["tiny"]["vocab_size"], (options.iterations, options.batch, options.length))
    prepare_deepspeed(device().type)
    print(f"{'stage':>5} {'by hand, ms':>12} {'trainer, ms':>12} {'ratio':>7}")
    for stage in options.stages:
        # The Trainer first: it starts the process group that the loop by hand then uses.
        rounds = [(through_the_trainer(stage, batches), by_hand(stage, batches)) for _ in range(options.rounds)]
        trainer, hand = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(ours / theirs for ours, theirs in rounds)
        print(f"{stage:>5} {hand * 1e3:>12.2f} {trainer * 1e3:>12.2f} {ratio:>7.3f}")


def ppo(options: argparse.Namespace) -> list[Panel]:
    """Print the figures of both backends inside PPO, and write them all."""
    if options.model is None and options.shape is None:
        options.shape = "llama-4m"  # the small real model's heads are too narrow for vLLM on a CPU
    source = _source(options)
    rows, new = options.size
    if any(rows % ranks for ranks in options.ranks):
        raise SystemExit(f"--size: {rows} responses are not shared evenly by each of --ranks {options.ranks}")
    path = str(Path(source.path).resolve()) if source.path and Path(source.path).is_dir() else source.path
    given = (path, source.shape, source.prompt_tokens, rows, new, options.iterations, options.pushes, options.threads)
    places = itertools.product(options.stages, options.ranks, BACKENDS)
    cells = [Cell(backend, stage, ranks, *given) for stage, ranks, backend in places]
    title = f"{source}: {rows} responses of up to {new} tokens"
    print(f"\n{title}, {_where(options)}, {options.iterations} iterations of PPO, rounds: {options.rounds}")
    figures = options.png.with_suffix(".json")
    measured = compare_backends(cells, options.rounds, figures)
    print_backends(measured)
    print(f"\n{backends.FOOTNOTES}\n{loads(measured)}\nall figures in {figures}")
    return panels_of(measured, title)


def _source(options: argparse.Namespace) -> Source:
    """What was asked for; else the small real model beside the checkout; else a tiny one with random weights."""
    if options.shape is not None:
        return Source(None, options.shape, tuple(options.prompt_tokens))
    path = options.model or (str(MODEL) if MODEL.is_dir() else None)
    return Source(path, prompt_tokens=tuple(options.prompt_tokens))


def _where(options: argparse.Namespace) -> str:
    if torch.cuda.is_available():
        return f"bf16 on {torch.cuda.get_device_name(0)}"
    return f"float32 on a CPU, {options.threads} thread{'s' if options.threads > 1 else ''}"


def _size(text: str) -> tuple[int, int]:
    """``256x400`` as prompts and new tokens."""
    count, _, tokens = text.partition("x")
    if not (count.isdigit() and tokens.isdigit() and int(count) > 0 and int(tokens) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not PROMPTSxTOKENS, such as 64x64")
    return int(count), int(tokens)


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    on_cuda = torch.cuda.is_available()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", help="folder or hub name; by default a small model beside the checkout, if any")
    common.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    lengths = [128, 512] if on_cuda else [8, 32]
    common.add_argument("--prompt-tokens", type=int, nargs=2, default=lengths, help="range, with random weights")
    common.add_argument("--rounds", type=int, default=3, help="that count, after one that does not")
    common.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU")
    common.add_argument("--png", type=Path, default=Path("outputs/benchmark.png"), help="where to draw")

    rollouts = argparse.ArgumentParser(add_help=False)
    sizes = [(256, 1024)] if on_cuda else [(256, 400), (64, 64)]
    rollouts.add_argument("--sizes", type=_size, nargs="+", default=sizes, help="PROMPTSxTOKENS, a table for each")
    rollouts.add_argument("--all", action="store_true", help="also peers that take minutes")

    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--step-size", type=_size, default=(64, 64), help="RESPONSESxTOKENS")
    steps.add_argument("--per-prompt", type=int, default=8, help="responses to each prompt")
    steps.add_argument("--steps", type=int, default=5, help="timed in each round")

    inside = argparse.ArgumentParser(add_help=False)
    inside.add_argument("--size", type=_size, default=(32, 64), help="RESPONSESxTOKENS of an iteration")
    inside.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="of ZeRO")
    inside.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    inside.add_argument("--iterations", type=int, default=3, help="that count, between two that do not")
    inside.add_argument("--pushes", type=int, default=5, help="of all weights in each order")

    engines = argparse.ArgumentParser(add_help=False)
    engines.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    engines.add_argument("--rounds", type=int, default=5)
    engines.add_argument("--iterations", type=int, default=25)
    engines.add_argument("--batch", type=int, default=16)
    engines.add_argument("--length", type=int, default=64)

    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)
    commands.add_parser("rollout", parents=[common, rollouts], help="generation beside its peers")
    commands.add_parser("step", parents=[common, steps], help="a PPO step beside TRL's GRPO step")
    commands.add_parser("all", parents=[common, rollouts, steps], help="rollout, then step")
    commands.add_parser("ppo", parents=[common, inside], help="native beside vLLM inside PPO, and orders of pushing")
    commands.add_parser("strategy", parents=[engines], help="the strategy beside the same engines driven by hand")
    return whole


def main() -> None:
    """Run a comparison."""
    options = parser().parse_args()
    if options.command == "strategy":
        strategy(options)
        return
    torch.set_num_threads(options.threads)
    jobs = {"rollout": [rollout], "step": [step], "all": [rollout, step], "ppo": [ppo]}[options.command]
    panels = [panel for job in jobs for panel in job(options) if panel.bars]
    if panels:
        draw(panels, options.png)
        print(f"drawn in {options.png}")


if __name__ == "__main__":
    main()

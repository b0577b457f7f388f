"""SFT, reward model and PPO one after another, then the policies before and after PPO compared on held-out prompts.

``stages`` names the folder of ``conf/experiment`` whose ``sft``, ``reward`` and ``ppo`` are run; what is judged, and by
whom, is in ``judges.py``. Each stage is the recipe of that name with that experiment, so it can also be run alone.
Out come ``report.html`` and ``comparison.json`` in ``output_dir``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from judges import JUDGES, Judge
from lightning.fabric.utilities.rank_zero import _get_rank
from ppo import train_ppo
from reward import train_reward
from sft import train_sft

from lightning_hybrid.assemble import data_arguments
from lightning_hybrid.config import PPORun, QuickstartRun, RewardRun, Run, SFTRun
from lightning_hybrid.config.run import compose_run, recipe_main
from lightning_hybrid.data import PromptDataModule, write_task
from lightning_hybrid.models import Policy, load_policy, load_tokenizer
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.modules.text import decode_responses
from lightning_hybrid.report import Comparison, draw_comparison, draw_curves, read_metrics, write_report
from lightning_hybrid.rl import estimate_kl
from lightning_hybrid.rollout import Rollout, make_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RunT = TypeVar("RunT", bound=Run)


@dataclass(frozen=True)
class Outcome:
    """The policies before and after PPO under the judge, and how far PPO moved.

    ``kl`` is KL(ppo ‖ sft) in nats per response, estimated (k1) on the PPO policy's own samples.
    """

    sft: float
    ppo: float
    kl: float
    kl_per_token: float
    best: float
    seconds: dict[str, float]


def quickstart(run: QuickstartRun) -> None:
    """Run the stages, compare, report."""
    root = Path(run.output_dir)
    if run.stages == "quickstart" and _is_first_rank():
        write_task(root / "task", run.seed)
    sft = _stage(run, "sft", SFTRun)
    reward = _stage(run, "reward", RewardRun)
    ppo = _stage(run, "ppo", PPORun)
    seconds = {
        "sft": _timed(lambda: train_sft(sft, "1/3 sft")),
        "reward": _timed(lambda: train_reward(reward, "2/3 reward")),
        "ppo": _timed(lambda: train_ppo(ppo, "3/3 ppo")),
    }
    if _is_first_rank():
        _report(run, ppo, JUDGES[run.stages](ppo), seconds)


def _timed(job: Callable[[], object]) -> float:
    """Do it, and say how many seconds it took."""
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def _stage(run: QuickstartRun, name: str, schema: type[RunT]) -> RunT:
    """The configuration of a stage: its experiment, this run's folder and seed, and the overrides given for it."""
    overrides = [f"experiment={run.stages}/{name}", f"root={run.output_dir}", f"seed={run.seed}"]
    return compose_run(name, schema, overrides + getattr(run.overrides, name))


def _report(run: QuickstartRun, ppo: PPORun, judge: Judge, seconds: dict[str, float]) -> None:
    root = Path(run.output_dir)
    begin = time.perf_counter()
    outcome, samples = compare(ppo, judge, run.heldout_samples, run.seed, seconds)
    seconds["comparison"] = time.perf_counter() - begin
    (root / "comparison.json").write_text(json.dumps(asdict(outcome), indent=2))
    metrics = {stage: root / stage / "metrics.csv" for stage in ("sft", "reward", "ppo")}
    draw_curves({stage: read_metrics(path) for stage, path in metrics.items() if path.is_file()}, root / "curves.png")
    draw_comparison([s.score_before for s in samples], [s.score_after for s in samples], root / "scores.png")
    headline = {
        f"{judge.name}, SFT": f"{outcome.sft:.3f}",
        f"{judge.name}, PPO": f"{outcome.ppo:.3f}",
        "best possible": f"{outcome.best:.3f}",
        "KL, nats per response": f"{outcome.kl:.2f}",
        "minutes": f"{sum(seconds.values()) / 60:.1f}",
    }
    report = write_report(
        root / "report.html",
        f"lightning-hybrid: {run.stages}",
        headline,
        root / "curves.png",
        samples[:24],
        ppo.model_dump(),
        scores=root / "scores.png",
    )
    print(f"report: {report.resolve()}")
    print(f"{judge.name}: sft={outcome.sft:.3f} ppo={outcome.ppo:.3f} kl={outcome.kl:.2f}")


def compare(
    run: PPORun, judge: Judge, count: int, seed: int, seconds: dict[str, float]
) -> tuple[Outcome, list[Comparison]]:
    """Sample ``count`` responses to held-out prompts from both policies and have them judged."""
    before, after = load_policy(str(run.model.path)), load_policy(Path(run.output_dir) / "model")
    tokenizer = load_tokenizer(str(run.model.path))
    texts, ids = _heldout_prompts(run, before, tokenizer, count, seed)
    backend = make_backend(run.rollout, [tokenizer.eos_token_id], tokenizer.pad_token_id or 0, tokenizer)
    rollouts = [backend.generate(policy.model.eval(), ids, seed=seed) for policy in (before, after)]
    responses = [decode_responses(tokenizer, rollout) for rollout in rollouts]
    scores = [judge(texts, answers) for answers in responses]
    kl = _kl(after, before, rollouts[1], run.rollout.temperature)
    outcome = Outcome(
        sft=sum(scores[0]) / count,
        ppo=sum(scores[1]) / count,
        kl=float(kl.sum()) / count,
        kl_per_token=float(kl.sum() / rollouts[1].response_mask.sum()),
        best=judge.best,
        seconds=seconds,
    )
    rows = zip(texts, *responses, *scores, strict=True)
    return outcome, [Comparison(*row) for row in rows]


def _heldout_prompts(
    run: PPORun, policy: Policy, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> tuple[list[str], list[list[int]]]:
    """``count`` validation prompts of the PPO stage in random order, from the start again where there are fewer."""
    data = PromptDataModule(**data_arguments(run.data, tokenizer, policy), max_new_tokens=run.rollout.max_new_tokens)
    batches = list(data.val_dataloader())
    texts = [text for batch in batches for text in batch["prompts"]]
    ids = [prompt for batch in batches for prompt in batch["prompt_ids"]]
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    picked = [order[i % len(order)] for i in range(count)]
    return [texts[i] for i in picked], [ids[i] for i in picked]


def _kl(policy: Policy, reference: Policy, rollout: Rollout, temperature: float) -> torch.Tensor:
    """KL of each sampled token, ``[batch, time]``, at the temperature it was sampled at."""
    return estimate_kl(
        policy_logprobs(policy, rollout, 32, temperature), policy_logprobs(reference, rollout, 32, temperature)
    )


def _is_first_rank() -> bool:
    return _get_rank() in (None, 0)


if __name__ == "__main__":
    recipe_main("quickstart", QuickstartRun, quickstart)

"""From a batch of prompts to scored responses; prompts whose responses tell nothing may make room for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hybrid.algorithms import GroupConfig
from lightning_hybrid.modules.scoring import reward_scores
from lightning_hybrid.rewards import check_fields
from lightning_hybrid.rollout import Rollout, join

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


@dataclass(frozen=True)
class Samples:
    """One rank's scored responses; those to one prompt stand together.

    Attributes:
        rollout: ``batch`` responses, ``group_size`` to each prompt.
        raw_scores: ``[batch]`` float32, the reward's own numbers.
        penalties: ``[batch]`` float32, what is taken off for how, or how late, a response ended.
        figures: of the reward, by name, ``[batch]`` float32 each, such as the scores of its terms.
        group: ``[batch]`` long, the number of each response's prompt.
        drawn: responses that were sampled to get these; more than ``batch`` where some were not kept.
    """

    rollout: Rollout
    raw_scores: Tensor
    penalties: Tensor
    figures: dict[str, Tensor]
    group: Tensor
    drawn: int

    def __len__(self) -> int:
        return len(self.raw_scores)

    def pick(self, groups: list[int]) -> Samples:
        """The groups of these positions, in this order."""
        size = int((self.group == self.group[0]).sum())
        rows = [size * position + sample for position in groups for sample in range(size)]
        figures = {name: values[rows] for name, values in self.figures.items()}
        kept = (self.raw_scores[rows], self.penalties[rows], figures, self.group[rows])
        return Samples(self.rollout.pick(rows), *kept, self.drawn)


@dataclass(frozen=True)
class Drawn:
    """One rank's responses before they are scored.

    Attributes:
        rollout: ``group_size`` responses to each prompt, which stand together.
        prompts: text of each prompt.
        fields: columns of the data, each with one value per prompt.
    """

    rollout: Rollout
    prompts: list[str]
    fields: dict[str, list[Any]]


def draw_seed(module: PPOModule, step: int) -> int:
    """Seed of an iteration's rollout."""
    return hash((module.seed, step, 0)) % 2**63


def entering_scores(module: PPOModule, samples: Samples) -> Tensor:
    """Scores as they enter the rewards, ``[batch]`` float32: normalised if configured, less the penalties."""
    scale = module.moments_now.scale if module.config.normalize_reward else 1.0
    return samples.raw_scores / scale - samples.penalties


def informative(module: PPOModule, samples: Samples) -> list[bool]:
    """Of each group, in order, whether its scores differ once they are limited as the rewards are."""
    scores, limit = entering_scores(module, samples), module.config.reward_clip
    groups = (scores if limit is None else scores.clamp(-limit, limit)).view(-1, module.config.group_size)
    return (groups != groups[:, :1]).any(1).tolist()


def collect_samples(module: PPOModule, batch: dict[str, Any]) -> Samples:
    """Sample and score responses to a batch of prompts; all of them, unless the algorithm asks for ``groups``.

    With ``groups``, prompts are taken in turn until every rank has that many groups whose scores differ, or the batch
    is at its end; all ranks take as many at a time, because they sample and score together. A rank that is then short
    of such groups fills up with others, which give no advantage.

    With a pipeline, responses are those to as many prompts as the batch has, see
    :class:`~lightning_hybrid.modules.pipeline.Pipeline`.
    """
    check_fields(module.reward, batch.get("fields", {}), "the data")
    if module.pipeline is not None:
        with module.phase("rollout"):
            drawn = module.pipeline.draw(batch)
        return _scored(module, drawn)
    prompts = len(batch["prompt_ids"])
    wanted = _groups_wanted(module, prompts)
    parts: list[Samples] = []
    begin, missing = 0, wanted
    while missing and begin < prompts:
        end = min(begin + missing, prompts)
        parts.append(_sample(module, batch, begin, end))
        begin, missing = end, _missing_anywhere(module, parts, wanted)
    together = parts[0] if len(parts) == 1 else _joined(parts)
    return together if len(together) == wanted * module.config.group_size else _chosen(module, together, wanted)


def say_when_nothing_is_told(iteration: int, groups: int, share_alike: float, times: int) -> int:
    """Warn where the scores of every group are equal: the first time, and each time their number has doubled.

    Args:
        iteration: that has ended, from 1.
        groups: in it, over all ranks.
        share_alike: of them, those whose scores are equal.
        times: that it happened before.

    Returns:
        How often it has happened now.
    """
    if share_alike < 1.0:
        return times
    times += 1
    if times & (times - 1) == 0:
        rank_zero_warn(
            f"all {groups} groups of iteration {iteration} have equal scores inside each group, which gives no signal "
            f"({times} such iterations so far): look at the samples; the reward may be too hard or too easy, or "
            "group_size too small"
        )
    return times


def _groups_wanted(module: PPOModule, prompts: int) -> int:
    config = module.config
    return min(config.groups, prompts) if isinstance(config, GroupConfig) and config.groups else prompts


def _missing_anywhere(module: PPOModule, parts: list[Samples], wanted: int) -> int:
    """How many groups the rank lacks that lacks the most; none where every prompt is taken as it is."""
    if not isinstance(module.config, GroupConfig) or module.config.groups is None:
        return 0
    found = sum(sum(informative(module, part)) for part in parts)
    lacking = torch.tensor(max(wanted - found, 0), device=module.device)
    return int(module.trainer.strategy.reduce(lacking, reduce_op="max"))


def _sample(module: PPOModule, batch: dict[str, Any], begin: int, end: int) -> Samples:
    """Responses to the prompts ``begin`` to ``end`` of a batch, and their scores."""
    with module.phase("rollout"):
        rollout = module.roll_out(batch["prompt_ids"][begin:end], n=module.config.group_size, first=begin)
    fields = {name: values[begin:end] for name, values in batch.get("fields", {}).items()}
    return _scored(module, Drawn(rollout, batch["prompts"][begin:end], fields), begin)


def _scored(module: PPOModule, drawn: Drawn, first: int = 0) -> Samples:
    """The responses with their scores; their prompts are numbered from ``first``."""
    size, rollout = module.config.group_size, drawn.rollout
    with module.phase("reward"):
        repeated = {name: _repeated(values, size) for name, values in drawn.fields.items()}
        raw = reward_scores(module, _repeated(drawn.prompts, size), rollout, repeated)
    group = torch.arange(first, first + len(drawn.prompts), device=raw.device).repeat_interleave(size)
    return Samples(rollout, raw, _penalties(module, rollout), dict(module.reward.figures), group, len(raw))


def _repeated(values: list[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]


def _penalties(module: PPOModule, rollout: Rollout) -> Tensor:
    """What is taken off each score for how, or how late, its response ended, ``[batch]`` float32."""
    config, lengths = module.config, rollout.lengths.float()
    taken = torch.zeros_like(lengths)
    if config.missing_eos_penalty is not None:
        taken += config.missing_eos_penalty * (~rollout.finished).float()
    if config.overlong_buffer is not None:
        over = lengths - (module.rollout_config.max_new_tokens - config.overlong_buffer)
        taken += config.overlong_penalty * (over / config.overlong_buffer).clamp(0.0, 1.0)
    return taken


def _joined(parts: list[Samples]) -> Samples:
    return Samples(
        join([part.rollout for part in parts]),
        torch.cat([part.raw_scores for part in parts]),
        torch.cat([part.penalties for part in parts]),
        {name: torch.cat([part.figures[name] for part in parts]) for name in parts[0].figures},
        torch.cat([part.group for part in parts]),
        sum(part.drawn for part in parts),
    )


def _chosen(module: PPOModule, samples: Samples, wanted: int) -> Samples:
    """The first groups whose scores differ, and others where those are too few, in their order."""
    by_worth = sorted(enumerate(informative(module, samples)), key=lambda entry: not entry[1])
    return samples.pick(sorted(position for position, _ in by_worth[:wanted]))

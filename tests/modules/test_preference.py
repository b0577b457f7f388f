"""DPO and KTO: losses that are the papers', figures and gradients that do not depend on how rows were cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hybrid import DPOConfig, DPOModule, HybridDeepSpeedStrategy, KTOConfig, KTOModule
from lightning_hybrid.errors import ConfigError, DataError
from lightning_hybrid.models import Policy
from lightning_hybrid.models.adapters import AdaptersOff
from lightning_hybrid.modules.sequences import Texts, mismatched
from tests.helpers import SHARD_EVERYTHING, quiet_trainer, tiny_policy, weights_of

Row = tuple[list[int], list[int], list[int]]


def side(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in rows)
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    batch |= {name: torch.zeros(len(rows), width, dtype=torch.bool) for name in ("attention_mask", "loss_mask")}
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        batch["input_ids"][row, :end] = torch.tensor(prompt + response)
        batch["attention_mask"][row, :end] = True
        batch["loss_mask"][row, len(prompt) : end] = True
    return batch


def pairs(rows: list[Row]) -> dict[str, dict[str, Tensor]]:
    return {
        "chosen": side([(prompt, chosen) for prompt, chosen, _ in rows]),
        "rejected": side([(prompt, rejected) for prompt, _, rejected in rows]),
    }


def unpaired(rows: list[tuple[list[int], list[int], bool]]) -> dict[str, Tensor]:
    batch = side([(prompt, response) for prompt, response, _ in rows])
    return batch | {"desirable": torch.tensor([desirable for *_, desirable in rows])}


def random_ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high, (), generator=generator))
    return torch.randint(3, 45, (length,), generator=generator).tolist()


def random_pairs(count: int, seed: int = 0) -> list[Row]:
    g = torch.Generator().manual_seed(seed)
    return [([1, *random_ids(g, 1, 6)], [*random_ids(g, 1, 8), 2], [*random_ids(g, 1, 8), 2]) for _ in range(count)]


def random_unpaired(count: int, seed: int = 0) -> list[tuple[list[int], list[int], bool]]:
    rows = random_pairs(count, seed)
    return [(prompt, chosen, index % 3 != 0) for index, (prompt, chosen, _) in enumerate(rows)]


def plain_logprob(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    """The definition, of one text alone, without padding."""
    logp = policy.model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return torch.stack([logp[len(prompt) + i - 1, token] for i, token in enumerate(response)]).sum()


def other(policy: Policy, seed: int = 5, size: float = 0.05) -> Policy:
    """The same network a little way off."""
    moved = tiny_policy()
    moved.load_state_dict(policy.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return moved


# ---- DPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_losses_of_pairs_are_those_of_each_pair_alone(kind: Any) -> None:
    reference = tiny_policy()
    module = DPOModule(other(reference), reference, DPOConfig(beta=0.3, kind=kind, sft_coef=0.5))
    rows = random_pairs(5)
    losses, figures = module._judge(pairs(rows))
    for index, (prompt, chosen, rejected) in enumerate(rows):
        gains = [
            plain_logprob(module.policy, prompt, response) - plain_logprob(reference, prompt, response)
            for response in (chosen, rejected)
        ]
        lead = gains[0] - gains[1]
        loss = {
            "sigmoid": -torch.log(torch.sigmoid(0.3 * lead)),
            "hinge": torch.clamp(1 - 0.3 * lead, min=0),
            "ipo": (lead - 1 / 0.6) ** 2,
        }[kind]
        sft = -plain_logprob(module.policy, prompt, chosen) / len(chosen)
        torch.testing.assert_close(losses[index].double(), loss + 0.5 * sft, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(figures["rewards/chosen"][index].double(), 0.3 * gains[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(figures["rewards/margin"][index].double(), 0.3 * lead, rtol=1e-3, atol=1e-5)
        assert figures["rewards/accuracy"][index] == float(lead > 0)


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (DPOConfig(), math.log(2)),
        (DPOConfig(label_smoothing=0.2), math.log(2)),
        (DPOConfig(kind="hinge"), 1.0),
        (DPOConfig(kind="ipo", beta=0.2), 1 / (4 * 0.2**2)),
    ],
    ids=lambda value: value.kind if isinstance(value, DPOConfig) else None,
)
def test_a_policy_starts_as_its_own_reference(config: DPOConfig, loss: float) -> None:
    module = DPOModule(tiny_policy(), config=config)
    losses, figures = module._judge(pairs(random_pairs(4)))
    torch.testing.assert_close(losses, torch.full((4,), loss))
    assert figures["rewards/chosen"].abs().max() == 0
    assert figures["rewards/accuracy"].tolist() == [0.5] * 4


def test_without_a_reference_no_model_is_kept_and_every_response_is_as_likely() -> None:
    module = DPOModule(tiny_policy(), config=DPOConfig(reference_free=True, beta=0.5))
    assert module.reference is None
    assert module.configure_engines() == {}
    _, figures = module._judge(pairs(random_pairs(4)))
    torch.testing.assert_close(figures["rewards/chosen"], 0.5 * figures["logps/chosen"].detach())


def test_the_reference_gets_no_gradient_and_dropout_is_off_in_both() -> None:
    module = DPOModule(tiny_policy(attention_dropout=0.5), tiny_policy(attention_dropout=0.5))
    batch = pairs(random_pairs(4))
    first, _ = module._judge(batch)
    second, _ = module._judge(batch)
    assert torch.equal(first, second)
    first.sum().backward()
    assert isinstance(module.reference, Policy)
    assert all(parameter.grad is None for parameter in module.reference.parameters())
    assert all(parameter.grad is not None for parameter in module.policy.parameters())
    assert module.policy.training


def with_lora(policy: Policy) -> Policy:
    from peft import LoraConfig, get_peft_model

    policy.model = get_peft_model(policy.model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return policy


@pytest.mark.parametrize("module_type", [DPOModule, KTOModule])
def test_with_adapters_the_reference_is_the_policy_without_them(module_type: Any) -> None:
    base = tiny_policy()
    module = module_type(with_lora(tiny_policy()))
    assert isinstance(module.reference, AdaptersOff)
    assert dict(module.named_children()).keys() == {"policy"}
    texts = Texts.of(pairs(random_pairs(4))["chosen"])
    with torch.no_grad():
        torch.testing.assert_close(texts.logprobs(module.reference), texts.logprobs(base.eval()))
    assert not torch.allclose(texts.logprobs(module.policy), texts.logprobs(base), atol=1e-3)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_training_adapters_leaves_the_reference_where_it_was(stage: int) -> None:
    module = DPOModule(with_lora(tiny_policy()), config=DPOConfig(lr=1e-2))
    texts = Texts.of(pairs(random_pairs(4))["chosen"])
    with torch.no_grad():
        base = texts.logprobs(tiny_policy().eval())
        before = texts.logprobs(module.policy)
    read: dict[str, Tensor] = {}

    class Read(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with torch.no_grad():
                read["policy"], read["reference"] = texts.logprobs(module.policy), texts.logprobs(module.reference)

    strategy = HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None)
    trainer = quiet_trainer(strategy, max_steps=3, callbacks=[Read()])
    trainer.fit(module, DataLoader(random_pairs(12), batch_size=4, collate_fn=pairs))
    torch.testing.assert_close(read["reference"], base, rtol=1e-4, atol=1e-4)
    assert (read["policy"] - before).abs().min() > 1e-3


def test_a_reference_with_fewer_tokens_is_refused() -> None:
    small = tiny_policy()
    small.config.vocab_size = 7
    with pytest.raises(ConfigError, match="the reference has 7 tokens and the policy 49: it cannot score"):
        DPOModule(tiny_policy(), small)


def test_pairs_that_do_not_mark_their_responses_are_refused() -> None:
    batch = pairs(random_pairs(2))
    del batch["rejected"]["loss_mask"]
    with pytest.raises(DataError, match="no 'loss_mask', which marks the tokens of the response"):
        DPOModule(tiny_policy())._judge(batch)


# ---- KTO ------------------------------------------------------------------------------------------------------------


def test_kto_losses_are_those_of_each_row_alone_over_a_shared_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_policy()
    config = KTOConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    module = KTOModule(other(reference), reference, config)
    monkeypatch.setattr(module, "_sum_over_ranks", lambda x: x)
    rows = random_unpaired(5)
    losses, figures = module._judge(unpaired(rows))
    gaps = [
        plain_logprob(module.policy, prompt, response) - plain_logprob(reference, prompt, response)
        for (prompt, *_), (_, response, _) in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    baseline = torch.stack(gaps).mean().clamp(min=0)
    torch.testing.assert_close(figures["kl"].double(), baseline.expand(5), rtol=1e-3, atol=1e-5)
    for index, (prompt, response, desirable) in enumerate(rows):
        gain = plain_logprob(module.policy, prompt, response) - plain_logprob(reference, prompt, response) - baseline
        weight, sign = (1.5, 1) if desirable else (0.5, -1)
        expected = weight * (1 - torch.sigmoid(0.3 * sign * gain))
        torch.testing.assert_close(losses[index].double(), expected, rtol=1e-4, atol=1e-5)
        assert figures["rewards/accuracy"][index] == float(sign * gain > 0)


def test_the_baseline_gets_no_gradient_and_is_not_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_policy()
    module = KTOModule(other(reference, size=0.3), reference)
    monkeypatch.setattr(module, "_sum_over_ranks", lambda x: x)
    texts = Texts.of(unpaired(random_unpaired(6)))
    _, baseline = module._reference_logprobs_and_baseline(texts)
    others = mismatched(texts, None)
    mean = (others.logprobs(module.policy) - others.logprobs(reference)).mean()
    assert not baseline.requires_grad
    assert baseline == mean.clamp(min=0)
    assert mean < 0  # random noise makes texts of a random model less likely


def test_a_row_alone_adds_nothing_to_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_policy()
    module = KTOModule(other(reference), reference)
    seen = []
    monkeypatch.setattr(module, "_sum_over_ranks", lambda x: seen.append(x.tolist()) or x)
    losses, figures = module._judge(unpaired(random_unpaired(1)))
    assert seen == [[0.0, 0.0]]
    assert figures["kl"].tolist() == [0.0]
    assert losses.isfinite().all()


def test_batches_of_one_row_are_refused_before_training() -> None:
    trainer = quiet_trainer("hybrid_deepspeed_stage_1", max_steps=1)
    loader = DataLoader(random_unpaired(4), batch_size=1, collate_fn=unpaired)
    with pytest.raises(ConfigError, match=r"batches have one row: set data.batch_size .* to 2 or more"):
        trainer.fit(KTOModule(tiny_policy()), loader)


# ---- training -------------------------------------------------------------------------------------------------------


class Figures(L.Callback):
    """What each optimizer step logged, and the validation at the end."""

    def __init__(self) -> None:
        self.steps: dict[int | str, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.steps) + 1:  # not in the middle of a step
            self.steps[trainer.global_step] = self._logged(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps["end"] = {name: v for name, v in self._logged(trainer).items() if name.startswith("val/")}

    def _logged(self, trainer: L.Trainer) -> dict[str, float]:
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


def build(kind: str) -> tuple[Any, list[Any], Any]:
    reference = tiny_policy()
    if kind == "dpo":
        config = DPOConfig(lr=1e-2, sft_coef=0.1, weight_decay=0.1)
        return DPOModule(other(reference), reference, config), random_pairs(16), pairs
    return KTOModule(other(reference), reference, KTOConfig(lr=1e-2, beta=0.5)), random_unpaired(16), unpaired


def train(
    kind: str, stage: int, batch_size: int, accumulate: int = 1, ranks: int = 1, shuffle: bool = False
) -> tuple[Tensor, Figures]:
    module, rows, collate = build(kind)
    config = SHARD_EVERYTHING if stage == 3 else None
    figures = Figures()
    trainer = quiet_trainer(
        HybridDeepSpeedStrategy(stage=stage, config=config),
        max_steps=2,
        devices=ranks,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=shuffle,
        callbacks=[figures],
    )
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collate)
    trainer.fit(module, loader, DataLoader(rows, batch_size=batch_size, collate_fn=collate))
    return weights_of(module.policy), figures


def assert_same_run(one: tuple[Tensor, Any], other_: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(one[0], other_[0], rtol=2e-4, atol=2e-5)
    assert one[1].keys() == other_[1].keys() == {1, 2, "end"}
    for step, figures in one[1].items():
        assert figures.keys() == other_[1][step].keys()
        for name, value in figures.items():
            assert value == pytest.approx(other_[1][step][name], rel=1e-3, abs=1e-4), (step, name)


def test_pairs_weigh_the_same_however_they_are_cut_into_batches() -> None:
    whole, cut = train("dpo", 2, 8), train("dpo", 3, 2, accumulate=4)
    assert_same_run((whole[0], whole[1].steps), (cut[0], cut[1].steps))
    expected = set(DPOModule.figures)
    assert whole[1].steps[2].keys() == expected | {"lr"}
    assert whole[1].steps["end"].keys() == {f"val/{name}" for name in expected}


def train_on_ranks(folder: str, kind: str, stage: int, batch_size: int, ranks: int) -> None:
    # Lightning's sampler takes the same rows in each step, whatever the number of ranks.
    weights, figures = train(kind, stage, batch_size, ranks=ranks, shuffle=True)
    torch.save((weights, figures.steps), Path(folder) / f"{ranks}-{torch.distributed.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("dpo", 2), ("dpo", 3), ("kto", 3)])
def test_two_ranks_train_and_log_what_one_does(tmp_path: Path, run_ranks: Any, kind: str, stage: int) -> None:
    run_ranks(train_on_ranks, 2, str(tmp_path), kind, stage, 4, 2)
    both = [torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1)]
    assert_same_run(both[0], both[1])
    if kind == "dpo":  # of KTO, each rank mismatches its own rows
        run_ranks(train_on_ranks, 1, str(tmp_path), kind, stage, 8, 1)
        assert_same_run(both[0], torch.load(tmp_path / "1-0.pt"))


def test_one_step_of_kto_is_the_gradient_of_its_loss() -> None:
    module, rows, collate = build("kto")
    losses_before, _ = _alone(module, collate(rows[:8]))
    weights, figures = train("kto", 2, 8)
    assert figures.steps[1]["loss"] == pytest.approx(float(losses_before.detach().mean()), rel=1e-5)
    assert figures.steps[1]["rewards/margin"] == pytest.approx(
        figures.steps[1]["rewards/chosen"] - figures.steps[1]["rewards/rejected"], rel=1e-5
    )
    assert figures.steps["end"]["val/loss"] < figures.steps[1]["loss"]
    assert not torch.equal(weights, weights_of(module.policy))


def _alone(module: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    module._sum_over_ranks = lambda x: x
    result: tuple[Tensor, dict[str, Tensor]] = module._judge(batch)
    return result


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_policy_learns_which_responses_are_preferred(kind: str) -> None:
    """Responses with token 10 are preferred to those with token 20, whatever stands around them."""
    rows = [(p, [*c[:-1], 10, 2], [*c[:-1], 20, 2]) for p, c, _ in random_pairs(32, seed=3)]
    alone = [(p, response, good) for p, c, r in rows for response, good in ((c, True), (r, False))]
    module: Any = DPOModule if kind == "dpo" else KTOModule
    config: Any = DPOConfig(lr=1e-2) if kind == "dpo" else KTOConfig(lr=1e-2)
    batches = DataLoader(
        rows if kind == "dpo" else alone, batch_size=16, collate_fn=pairs if kind == "dpo" else unpaired
    )
    figures = Figures()
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=12, callbacks=[figures])
    trainer.fit(module(tiny_policy(), config=config), batches)
    first, last = figures.steps[1], figures.steps[12]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["rewards/margin"] > 0.5 > abs(first["rewards/margin"])
    assert last["rewards/accuracy"] > 0.9 > first["rewards/accuracy"]

"""Settings of DPO and KTO that cannot be meant are refused, with what to do instead."""

from __future__ import annotations

import pytest

from lightning_hybrid.config import DPOConfig, DPORun, KTOConfig, KTORun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError

GIVEN = ["model.path=a-model", "data.path=rows.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.beta=0"], r"algorithm.beta = 0.*: must be greater than 0 \(how strongly the policy is held"),
        (["algorithm.beta=-0.1"], r"algorithm.beta = -0.1: must be greater than 0"),
        (["algorithm.kind=dpo"], r"algorithm.kind = 'dpo': must be 'sigmoid', 'hinge' or 'ipo'"),
        (["algorithm.label_smoothing=0.5"], r"algorithm.label_smoothing = 0.5: must be less than 0.5"),
        (
            ["algorithm.label_smoothing=0.1", "algorithm.kind=hinge"],
            r"algorithm.label_smoothing = 0.1: must be 0 with kind=hinge: only sigmoid has a smoothed form",
        ),
        (
            ["algorithm.reference_free=true", "algorithm.kind=ipo"],
            r"algorithm.reference_free = true: must be false with kind=ipo.*use kind=sigmoid or hinge",
        ),
        (
            ["algorithm.reference_free=true", "model.reference=another"],
            r"model.reference = 'another': must be null with algorithm.reference_free=true",
        ),
        (
            ["adapter=lora", "model.adapter.dropout=0.1"],
            r"model.adapter.dropout = 0.1: must be 0: policy and reference are compared without dropout",
        ),
        (["algorithm.sft_coef=-1"], r"algorithm.sft_coef = -1.*: must be greater than or equal to 0"),
        (
            ["data.margin_key=score"],
            r"data.margin_key = 'score': must be null: margins enter the loss of reward models",
        ),
        (["callbacks.ema_decay=1.0"], r"callbacks.ema_decay = 1.0: must be less than 1"),
        (["callbacks.ema_decay=0"], r"callbacks.ema_decay = 0.*: must be greater than 0"),
    ],
)
def test_dpo_refuses(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run("dpo", DPORun, [*GIVEN, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.beta=0.0"], r"algorithm.beta = 0.0: must be greater than 0"),
        (["data.batch_size=1"], r"data.batch_size = 1: must be 2 or more: the baseline of a batch is of prompts"),
        (["algorithm.desirable_weight=-1"], r"desirable_weight = -1.*: must be greater than or equal to 0"),
        (
            ["algorithm.desirable_weight=0.0", "algorithm.undesirable_weight=0.0"],
            r"desirable_weight = 0: must be above 0 where undesirable_weight is 0: nothing would be learned",
        ),
    ],
)
def test_kto_refuses(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run("kto", KTORun, [*GIVEN, *overrides])


@pytest.mark.parametrize(("name", "schema"), [("dpo", DPORun), ("kto", KTORun)])
def test_a_model_that_cannot_write_yet_is_refused(name: str, schema: type[DPORun | KTORun]) -> None:
    with pytest.raises(ConfigError, match="model.architecture = an architecture: preferences are learned by a model"):
        compose_run(name, schema, ["data.path=rows.jsonl", "model=tiny_llama", "model.tokenizer=a-tokenizer"])


def test_the_settings_stand_alone_in_python() -> None:
    assert DPOConfig(kind="ipo", beta=0.05).label_smoothing == 0.0
    assert KTOConfig(undesirable_weight=0.0).desirable_weight == 1.0
    with pytest.raises(ConfigError, match="label_smoothing = 0.2: must be 0 with kind=ipo"):
        DPOConfig(kind="ipo", label_smoothing=0.2)

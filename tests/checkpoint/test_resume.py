"""A run that goes on from a checkpoint ends as if it had never stopped: same weights, metrics, samples, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy
from tests.checkpoint.runs import SaveAt, ppo, prompt_file, strategy, train

STEPS = 7
SAVED = (2, 5)  # in the middle of the first epoch of five batches, and at its end


def assert_resumes_exactly(folder: Path, stage: int, lora: bool, precision: str, **arguments: Any) -> None:
    data = prompt_file(folder)
    whole, weights = train(
        ppo(lora), data, STEPS, strategy(stage, **arguments), (SaveAt(SAVED, folder),), precision=precision
    )
    for saved in SAVED:
        rest, resumed = train(
            ppo(lora),
            data,
            STEPS,
            strategy(stage, **arguments),
            resume=folder / f"step={saved}.ckpt",
            precision=precision,
        )
        assert rest == {step: said for step, said in whole.items() if step > saved}
        assert torch.equal(resumed, weights)


@pytest.mark.parametrize(
    ("stage", "lora", "precision"),
    [
        pytest.param(0, False, "32-true", marks=pytest.mark.slow),
        (2, False, "32-true"),
        (2, True, "bf16-mixed"),
        pytest.param(0, True, "32-true", marks=pytest.mark.slow),
        pytest.param(1, False, "32-true", marks=pytest.mark.slow),
        pytest.param(1, True, "32-true", marks=pytest.mark.slow),
        pytest.param(2, True, "32-true", marks=pytest.mark.slow),
        pytest.param(3, False, "32-true", marks=pytest.mark.slow),
        pytest.param(3, True, "32-true", marks=pytest.mark.slow),
        pytest.param(1, False, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(2, False, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(3, False, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(1, True, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param(3, True, "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stage: int, lora: bool, precision: str) -> None:
    assert_resumes_exactly(tmp_path, stage, lora, precision)


def test_so_it_is_from_a_checkpoint_written_beside_training(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, 2, False, "32-true", checkpoint={"asynchronous": True})


def test_so_it_is_with_optimizer_states_in_host_memory(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, 2, False, "32-true", offload_optimizer=True)


def test_so_it_is_where_a_schedule_asks_how_long_an_epoch_is(tmp_path: Path) -> None:
    """Its data is then loaded before there are engines."""
    data = prompt_file(tmp_path)
    whole, weights = train(ppo(), data, STEPS, strategy(2), (SaveAt((2,), tmp_path),), max_epochs=2)
    rest, resumed = train(ppo(), data, STEPS, strategy(2), resume=tmp_path / "step=2.ckpt", max_epochs=2)
    assert rest == {step: said for step, said in whole.items() if step > 2}
    assert torch.equal(resumed, weights)


def resume_on_two_ranks(folder: str, stage: int, lora: bool, precision: str) -> None:
    assert_resumes_exactly_on_ranks(Path(folder), stage, lora, precision)


def assert_resumes_exactly_on_ranks(folder: Path, stage: int, lora: bool, precision: str) -> None:
    data = folder / "prompts.txt"
    arguments = {"precision": precision, "devices": 2, "batch_size": 4, "use_distributed_sampler": True}
    whole, weights = train(ppo(lora), data, STEPS, strategy(stage), (SaveAt(SAVED, folder),), **arguments)
    for saved in SAVED:
        resume = folder / f"step={saved}.ckpt"
        rest, resumed = train(ppo(lora), data, STEPS, strategy(stage), resume=resume, **arguments)
        assert rest == {step: said for step, said in whole.items() if step > saved}
        assert torch.equal(resumed, weights)


@pytest.mark.parametrize(
    ("stage", "lora", "precision"),
    [
        (3, False, "32-true"),
        *(
            pytest.param(stage, lora, precision, marks=pytest.mark.slow)
            for precision in ("32-true", "bf16-mixed")
            for stage in (0, 1, 2, 3)
            for lora in (False, True)
            if (stage or precision == "32-true") and (stage, lora, precision) != (3, False, "32-true")
        ),
    ],
)
def test_two_ranks_resume_as_if_uninterrupted(
    tmp_path: Path, run_ranks: Any, stage: int, lora: bool, precision: str
) -> None:
    prompt_file(tmp_path)
    run_ranks(resume_on_two_ranks, 2, str(tmp_path), stage, lora, precision, timeout=300)


def test_so_it_is_with_everything_asleep_that_may(tmp_path: Path) -> None:
    asleep = ("optimizer", "gradients", "master_weights", "weights", "kv_cache", "frozen_models")
    assert_resumes_exactly(tmp_path, 2, False, "bf16-mixed", sleep=dict.fromkeys(asleep, True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_runs_of_one_configuration_write_the_same_bytes(tmp_path: Path, stage: int) -> None:
    data = prompt_file(tmp_path)
    for name in ("one", "other"):
        saves = (SaveAt((3,), tmp_path / name),)
        train(ppo(), data, 3, strategy(stage), saves, deterministic=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert len(contents(tmp_path / "one")) > 5


@pytest.mark.slow
def test_so_it_is_with_fp32_gradients_under_bf16_weights(tmp_path: Path) -> None:
    """DeepSpeed takes another optimizer wrapper then, which keeps things under other names."""
    config = {"data_types": {"grad_accum_dtype": "fp32"}}
    data = prompt_file(tmp_path)
    whole, weights = train(
        ppo(),
        data,
        5,
        HybridDeepSpeedStrategy(stage=1, config=config),
        (SaveAt((2,), tmp_path),),
        precision="bf16-mixed",
    )
    plugin = HybridDeepSpeedStrategy(stage=1, config=config)
    rest, resumed = train(ppo(), data, 5, plugin, resume=tmp_path / "step=2.ckpt", precision="bf16-mixed")
    assert rest == {step: whole[step] for step in (3, 4, 5)}
    assert torch.equal(resumed, weights)

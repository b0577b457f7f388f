"""A checkpoint goes on with another number of ranks, or at another ZeRO stage: same weights, same optimizer state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lightning_hybrid.checkpoint.tensors import Stretches
from tests.checkpoint.runs import SaveAt, ppo, prompt_file, strategy, train


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All weights and optimizer states in a checkpoint, whole, by engine and name."""
    found = {}
    for engine in sorted((folder / "engines").iterdir()):
        summary = json.loads((engine / "engine.json").read_text())
        stretches = Stretches(sorted(engine.glob("rank-*.safetensors")))
        for name in stretches.names():
            numel = int(torch.tensor(summary["parameters"][name.rsplit(":", 1)[0]]).prod())
            found[f"{engine.name}/{name}"] = stretches.whole(name, numel)
        for name, numbers in summary["numbers"].items():
            found[f"{engine.name}/{name}:step"] = torch.tensor(numbers["step"]["tensor"])
    return found


class SaveAtOnce(L.Callback):
    """Save before the first step, what was just loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.target)


def go_on(folder: str, source: str, target: str, stage: int, batch_size: int, ranks: int) -> None:
    """Load, save what was loaded, and train two more steps."""
    train(
        ppo(),
        Path(folder) / "prompts.txt",
        5,
        strategy(stage),
        (SaveAtOnce(Path(folder) / target), SaveAt((5,), Path(folder))),
        resume=Path(folder) / source,
        batch_size=batch_size,
        devices=ranks,
        use_distributed_sampler=True,
    )


def begin(folder: str, stage: int, batch_size: int, ranks: int) -> None:
    saves = (SaveAt((3,), Path(folder)),)
    arguments = {"batch_size": batch_size, "devices": ranks, "use_distributed_sampler": True}
    train(ppo(), Path(folder) / "prompts.txt", 3, strategy(stage), saves, **arguments)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(name.endswith("exp_avg") for name in one)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (3, 2),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0), (2, 3), (3, 0))
        ),
    ],
)
def test_another_stage_goes_on_with_the_same_weights_and_optimizer_state(
    tmp_path: Path, before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    prompt_file(tmp_path)
    begin(str(tmp_path), before, 8, 1)
    with caplog.at_level("WARNING"):
        go_on(str(tmp_path), "step=3.ckpt", "loaded.ckpt", after, 8, 1)
    assert f"written at ZeRO stage {before} and goes on at {after}: weights and optimizer state" in caplog.text
    assert_same(everything(tmp_path / "step=3.ckpt"), everything(tmp_path / "loaded.ckpt"))
    assert (tmp_path / "step=5.ckpt").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 2), (3, 0), (3, 3), (0, 1)])
@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_ranks_goes_on_with_the_same_weights_and_optimizer_state(
    tmp_path: Path, run_ranks: Any, before: int, after: int, first: int
) -> None:
    prompt_file(tmp_path)
    second = 3 - first
    run_ranks(begin, first, str(tmp_path), before, 8 // first, first)
    run_ranks(go_on, second, str(tmp_path), "step=3.ckpt", "loaded.ckpt", after, 8 // second, second)
    assert_same(everything(tmp_path / "step=3.ckpt"), everything(tmp_path / "loaded.ckpt"))
    assert (tmp_path / "step=5.ckpt").is_dir()


def test_a_checkpoint_holds_each_weight_once_whatever_the_stage(tmp_path: Path) -> None:
    prompt_file(tmp_path)
    begin(str(tmp_path), 0, 8, 1)
    at_0 = load_file(tmp_path / "step=3.ckpt/engines/actor/rank-00000.safetensors")
    shapes = json.loads((tmp_path / "step=3.ckpt/engines/actor/engine.json").read_text())["parameters"]
    weights = {name.removesuffix(":weight"): v for name, v in at_0.items() if name.endswith(":weight")}
    assert {name: v.numel() for name, v in weights.items()} == {
        name: int(torch.tensor(shape).prod()) for name, shape in shapes.items()
    }

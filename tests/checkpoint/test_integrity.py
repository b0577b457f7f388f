"""A checkpoint is what was written, or refused by name; what was complete before stays."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_hybrid.checkpoint.save
from lightning_hybrid.checkpoint import newest_complete, problems
from lightning_hybrid.checkpoint.manifest import FileEntry, entries, read_manifest, write_manifest
from lightning_hybrid.errors import CheckpointError
from lightning_hybrid.modules.roles import scalar_from_policy
from tests.checkpoint.runs import SaveAt, ppo, prompt_file, strategy, train
from tests.helpers import tiny_policy


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written")
    train(ppo(), prompt_file(folder), 2, strategy(2), (SaveAt((1, 2), folder),))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def resume(folder: Path, name: str = "step=2.ckpt", steps: int = 3, module: Any = None, **arguments: Any) -> Any:
    data = folder / "prompts.txt"
    return train(module or ppo(), data, steps, strategy(2, **arguments), resume=folder / name)


def files_of(folder: Path) -> list[str]:
    return [entry.path for entry in entries(read_manifest(folder / "step=2.ckpt"))]


def test_every_file_is_listed_with_its_size_and_digest(folder: Path) -> None:
    checkpoint = folder / "step=2.ckpt"
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert there == {*files_of(folder), "manifest.json"}
    assert problems(checkpoint) == []


def test_the_manifest_says_what_the_run_was(folder: Path) -> None:
    manifest = read_manifest(folder / "step=2.ckpt")
    assert (manifest["global_step"], manifest["ranks"], manifest["stage"]) == (2, 1, 2)
    assert manifest["engines"] == ["actor", "critic"]
    assert set(manifest["frozen"]) == {"reference"}
    assert "torch" in manifest["versions"]


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(folder: Path) -> None:
    for name in [*files_of(folder), "manifest.json"]:
        path = folder / "step=2.ckpt" / name
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            (problem,) = problems(folder / "step=2.ckpt")
            assert name in problem
        path.write_bytes(content)
    assert problems(folder / "step=2.ckpt") == []


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_harmed_checkpoint_is_refused_and_the_newest_complete_one_offered(folder: Path, harm: str) -> None:
    path = folder / "step=2.ckpt/engines/critic/rank-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if harm == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    if harm == "remove":
        path.unlink()
    offer = r"'engines/critic/rank-00000\.safetensors' (is|has).*the newest complete one beside it is '.*step=1\.ckpt'"
    with pytest.raises(CheckpointError, match=offer):
        resume(folder)


def test_the_newest_complete_checkpoint_was_written_last_and_has_all_files(folder: Path) -> None:
    assert newest_complete(folder) == folder / "step=2.ckpt"
    (folder / "step=2.ckpt/lightning.ckpt").unlink()
    assert newest_complete(folder) == folder / "step=1.ckpt"
    (folder / "step=1.ckpt/manifest.json").write_text("{")
    assert newest_complete(folder) is None
    assert newest_complete(folder / "nowhere") is None


class Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_no_pickle_in_a_checkpoint_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    checkpoint = folder / "step=2.ckpt"
    manifest = read_manifest(checkpoint)
    torch.save({"state": Harm()}, checkpoint / "lightning.ckpt")
    facts = {key: value for key, value in manifest.items() if key not in ("files", "format", "versions")}
    write_manifest(checkpoint, [FileEntry.of(checkpoint, name) for name in files_of(folder)], facts)
    with pytest.raises(CheckpointError, match=r"lightning\.ckpt' holds more than plain data"):
        resume(folder)
    assert not (folder / "harmed").exists()
    assert pickle.loads(pickle.dumps(Harm())) is None  # it would have
    assert (folder / "harmed").exists()


def test_another_frozen_model_is_refused(folder: Path) -> None:
    other = ppo()
    with torch.no_grad():
        next(other.reference.parameters()).view(-1)[3] += 1e-6
    with pytest.raises(CheckpointError, match=r"frozen weights of 'reference' are not those .*\(1 of \d+ parameters"):
        resume(folder, module=other)


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_models_kept_by_value_come_back(tmp_path: Path, stage: int) -> None:
    data, keep = prompt_file(tmp_path), {"frozen_models": "value"}
    whole, weights = train(ppo(), data, 3, strategy(stage, checkpoint=keep), (SaveAt((1,), tmp_path),))
    other = ppo()
    with torch.no_grad():
        for parameter in other.reference.parameters():
            parameter.zero_()
    rest, resumed = train(other, data, 3, strategy(stage, checkpoint=keep), resume=tmp_path / "step=1.ckpt")
    assert rest == {step: whole[step] for step in (2, 3)}
    assert torch.equal(resumed, weights)


def test_another_model_is_refused_by_the_names_that_differ(folder: Path) -> None:
    other = ppo()
    other.critic = scalar_from_policy(tiny_policy(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"'model\.model\.layers\.1\..*' is in the checkpoint only"):
        resume(folder, module=other)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    prompt_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt' does not exist; none beside it is complete"):
        resume(tmp_path, name="nowhere.ckpt")


# ---- writing ----------------------------------------------------------------------------------------------------


class FullDisk:
    """Every write from the second file on fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.write = lightning_hybrid.checkpoint.save.write_tensors
        monkeypatch.setattr(lightning_hybrid.checkpoint.save, "write_tensors", self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise OSError(28, "No space left on device")
        return self.write(*arguments)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_the_run_and_leaves_what_was_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    FullDisk(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"cannot write .* \(\[Errno 28\] No space left on device; [\d,]+ MiB free"
    ):
        train(
            ppo(),
            folder / "prompts.txt",
            4,
            strategy(2, checkpoint={"asynchronous": asynchronous}),
            (SaveAt((3,), folder),),
            resume=folder / "step=2.ckpt",
        )
    assert sorted(p.name for p in folder.iterdir()) == ["prompts.txt", "step=1.ckpt", "step=2.ckpt"]
    monkeypatch.undo()
    rest, _ = resume(folder, steps=4)
    assert sorted(rest) == [3, 4]


def test_a_checkpoint_written_over_an_older_one_replaces_it_whole(folder: Path) -> None:
    class Over(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(folder / "step=1.ckpt")

    train(ppo(), folder / "prompts.txt", 3, strategy(2), (Over(),), resume=folder / "step=2.ckpt")
    assert read_manifest(folder / "step=1.ckpt")["global_step"] == 3
    assert problems(folder / "step=1.ckpt") == []
    assert sorted(p.name for p in folder.iterdir()) == ["prompts.txt", "step=1.ckpt", "step=2.ckpt"]

"""The small parts of a checkpoint: tensors in files, random streams, fingerprints, positions, differences."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.checkpoint import (
    Position,
    ResumableLoader,
    capture_streams,
    differences,
    fingerprints,
    restore_streams,
)
from lightning_hybrid.checkpoint.tensors import Stretches, read_tensors, write_tensors
from lightning_hybrid.errors import CheckpointError


def test_a_file_of_tensors_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16),
        "b": torch.arange(5),
        "empty": torch.empty(0),
        "slice": torch.randn(4, 6)[:, 2:4],
        "flag": torch.tensor([True, False]),
    }
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)
    for name, value in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(value, tensors[name])
        assert value.dtype == tensors[name].dtype


def test_a_tensor_of_a_type_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'z' is of type torch\.complex64"):
        write_tensors(tmp_path / "x.safetensors", {"z": torch.zeros(2, dtype=torch.complex64)})


def test_stretches_over_files_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    write_tensors(tmp_path / "0", {"w": whole[:3]}, {"w": 0})
    write_tensors(tmp_path / "1", {"w": whole[3:]}, {"w": 3})
    stretches = Stretches([tmp_path / "0", tmp_path / "1"])
    target = torch.zeros(5)
    stretches.read_into("w", 2, target)
    assert target.tolist() == [2, 3, 4, 5, 6]
    assert torch.equal(stretches.whole("w", 10), whole)
    with pytest.raises(CheckpointError, match="'w' lacks 2 of the elements 8 to 12"):
        stretches.read_into("w", 8, torch.zeros(4))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="'.*x' cannot be read"):
        read_tensors(tmp_path / "x")


def draw(generator: torch.Generator) -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.rand((), generator=generator)),
    )


def test_random_streams_go_on_where_they_were_captured(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    draw(generator)  # an odd number of Gaussians: a second one waits in Python and NumPy
    write_tensors(tmp_path / "streams", capture_streams([generator]))
    expected = [draw(generator) for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    restore_streams(read_tensors(tmp_path / "streams"), [generator])
    assert [draw(generator) for _ in range(3)] == expected


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 5).requires_grad_(False)


@pytest.mark.usefixtures("alone_in_group")
def test_a_fingerprint_tells_apart_any_change_of_a_frozen_weight() -> None:
    one, other = linear(), linear()
    assert fingerprints(one) == fingerprints(other)
    other.weight[3, 2] += 1e-7
    assert fingerprints(one)["bias"] == fingerprints(other)["bias"]
    assert fingerprints(one)["weight"] != fingerprints(other)["weight"]
    swapped = linear()
    swapped.weight[0], swapped.weight[1] = one.weight[1].clone(), one.weight[0].clone()
    assert fingerprints(one)["weight"] != fingerprints(swapped)["weight"]
    assert fingerprints(one.to(torch.bfloat16)) != fingerprints(linear())


class Drawn(Dataset[float]):
    """Items that depend on the process's random stream."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand(())) / 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("done", [0, 2, 4])
def test_a_loader_goes_on_with_what_it_would_have_given(workers: int, seeded: bool, done: int) -> None:
    def loader() -> ResumableLoader:
        generator = torch.Generator().manual_seed(5) if seeded else None
        return ResumableLoader(DataLoader(Drawn(), 3, shuffle=True, generator=generator, num_workers=workers))

    torch.manual_seed(0)
    whole = loader()
    batches = iter(whole)
    for _ in range(done):
        next(batches)
    position = whole.position(finished=True, ended=done == 4)
    # As Lightning does: it counts batches, and never asks for one more.
    rest = [next(batches).tolist() for _ in range(4 - done)] + [batch.tolist() for batch in whole]
    torch.manual_seed(99)
    resumed = loader()
    resumed.resume_at(position)
    batches = iter(resumed)
    if position.ended:
        restore_streams(position.now)  # as the strategy does when training begins
    again = [next(batches).tolist() for _ in range(4 - done)]
    again += [batch.tolist() for batch in (resumed if done < 4 else batches)]  # after the last comes the next epoch
    assert again == rest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_loader_that_looks_ahead_goes_on_so_as_well(workers: int, done: int) -> None:
    """Its position counts what it handed on; the batch ahead is drawn again from the streams it was drawn from."""

    def loader() -> ResumableLoader:
        return ResumableLoader(DataLoader(Drawn(), 3, shuffle=True, num_workers=workers), look_ahead=True)

    def handed_on(given: ResumableLoader, batches: Any, count: int) -> list[Any]:
        """Batches, what was said of the one after each, and a number that training drew beside them."""
        seen = []
        for _ in range(count):
            batch = next(batches)
            upcoming = given.upcoming
            seen.append((batch.tolist(), None if upcoming is None else upcoming.tolist(), float(torch.rand(()))))
        return seen

    torch.manual_seed(0)
    whole = loader()
    batches = iter(whole)
    before = handed_on(whole, batches, done)
    position = Position.from_tensors(whole.position(finished=True).tensors())
    rest = handed_on(whole, batches, 4 - done)
    assert [upcoming for _, upcoming, _ in before + rest] == [batch for batch, _, _ in (before + rest)[1:]] + [None]
    assert next(batches, None) is None
    torch.manual_seed(99)
    resumed = loader()
    resumed.resume_at(position)
    if position.ended:
        restore_streams(position.now)  # as the strategy does when training begins
    assert handed_on(resumed, iter(resumed), 4 - done) == rest


def test_a_position_of_a_loader_that_looked_ahead_serves_one_that_does_not() -> None:
    torch.manual_seed(0)
    ahead = ResumableLoader(DataLoader(Drawn(), 3, shuffle=True), look_ahead=True)
    batches = iter(ahead)
    next(batches)
    position = ahead.position(finished=True)
    upcoming = ahead.upcoming
    assert upcoming is not None
    plain = ResumableLoader(DataLoader(Drawn(), 3, shuffle=True))
    plain.resume_at(position)
    again = iter(plain)
    assert torch.equal(next(again), upcoming)
    assert plain.upcoming is None
    assert len([*again]) == 2


def test_settings_that_differ_are_listed_by_key() -> None:
    before = {"ckpt_path": None, "algorithm": {"kl_coef": 0.05, "gamma": 1.0}, "seed": 0}
    now = {"ckpt_path": "last", "algorithm": {"kl_coef": 0.02, "gamma": 1.0}, "seed": 0}
    assert differences(before, now) == ["algorithm.kl_coef: 0.05 -> 0.02"]

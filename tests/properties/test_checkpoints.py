"""Whatever lies where a checkpoint should be ends in a checkpoint that is what was written, or in our own error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from lightning_hybrid.checkpoint import newest_complete, problems
from lightning_hybrid.checkpoint.manifest import FORMAT, FileEntry, read_manifest, write_manifest
from lightning_hybrid.checkpoint.tensors import Stretches, read_tensors, write_tensors
from lightning_hybrid.errors import CheckpointError
from tests.properties import inputs
from tests.properties.cases import cases, success_or_our_own_error

FACTS: dict[str, Any] = {
    "global_step": 3,
    "epoch": 0,
    "ranks": 1,
    "stage": 2,
    "precision": "32-true",
    "engines": ["actor"],
    "loaders": 1,
    "frozen": {"reference": {"w": "00"}},
    "config": None,
}
places = st.sampled_from([*FACTS, "files", "format", "versions", "more"])
paths = st.one_of(
    st.sampled_from(["a", "../a", "/etc/passwd", "a/../../b", "", "a\0b", "engines/actor/x"]), inputs.texts
)
files = st.dictionaries(paths, st.one_of(inputs.json_values, st.just({"size": 1, "sha256": "0" * 64})), max_size=3)


def small_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "step=3.ckpt"
    checkpoint.mkdir(exist_ok=True)
    write_tensors(checkpoint / "rank-00000.safetensors", {"w:weight": torch.arange(6.0)}, {"w:weight": 0})
    (checkpoint / "lightning.ckpt").write_bytes(b"state")
    write_manifest(
        checkpoint,
        [FileEntry.of(checkpoint, p.name) for p in sorted(checkpoint.glob("*.*t*")) if p.name != "manifest.json"],
        FACTS,
    )
    assert problems(checkpoint) == []
    return checkpoint


@cases(st.tuples(places, st.one_of(inputs.json_values, files)), few=60, many=1500)
def test_a_manifest_with_any_content_is_read_or_refused(change: tuple[str, Any], folder: Path) -> None:
    content = {"format": FORMAT, "versions": {}, "files": {}, **FACTS, change[0]: change[1]}
    try:
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    except TypeError:
        return  # keys of several types cannot be sorted, nor written
    text = json.dumps({**content, "digest": digest})
    (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with success_or_our_own_error():
        read_manifest(folder)
    assert isinstance(problems(folder), list)
    newest_complete(folder.parent)


@cases(
    st.one_of(st.binary(max_size=200), inputs.texts.map(lambda t: t.encode("utf-8", "surrogatepass"))), few=40, many=600
)
def test_a_manifest_of_any_bytes_is_refused(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with success_or_our_own_error():
        read_manifest(folder)
    assert problems(folder)


@cases(st.tuples(st.integers(0, 2), st.integers(0, 10**6), st.integers(1, 255), st.booleans()), few=60, many=1500)
def test_a_changed_or_cut_file_is_always_found(harm: tuple[int, int, int, bool], folder: Path) -> None:
    checkpoint = small_checkpoint(folder)
    which, position, flip, cut = harm
    path = checkpoint / ("rank-00000.safetensors", "lightning.ckpt", "manifest.json")[which]
    content = path.read_bytes()
    position %= len(content)
    changed = content[:position] + (b"" if cut else bytes([content[position] ^ flip]) + content[position + 1 :])
    path.write_bytes(changed)
    found = problems(checkpoint)
    assert found
    assert path.name in found[0]


@cases(st.tuples(st.integers(0, 10**6), st.binary(max_size=12)), few=60, many=1000)
def test_a_file_of_tensors_with_any_bytes_in_it_is_read_or_refused(harm: tuple[int, bytes], folder: Path) -> None:
    path = folder / "x.safetensors"
    write_tensors(path, {"w": torch.arange(6.0), "v": torch.arange(4)}, {"w": 0, "v": 2})
    content = path.read_bytes()
    position = harm[0] % len(content)
    path.write_bytes(content[:position] + harm[1] + content[position + len(harm[1]) :])
    with success_or_our_own_error():
        read_tensors(path)
    with success_or_our_own_error():
        stretches = Stretches([path])
        if "w" not in stretches:
            raise CheckpointError("it has no 'w'")
        stretches.whole("w", 6)

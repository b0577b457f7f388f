from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from lightning_hybrid.data.task import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def story_tokenizer(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models/tinystories-656k")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines, or text or bytes as they are; give the file's name."""

    def to_file(name: str, content: str | bytes | list[object]) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to_file


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The one-line warnings of the project's logger."""

    class Messages(list[str]):
        def __iter__(self):
            return iter([record.getMessage() for record in caplog.records if record.name == "lightning_hybrid"])

    with caplog.at_level("WARNING", logger="lightning_hybrid"):
        yield Messages()

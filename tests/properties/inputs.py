"""What the outside may hand in: values, rows, and files that are right, nearly right, or nothing of the kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import Any

from hypothesis import strategies as st

WORDS = ["mia", "visits", "the market", ".", " ", "\n", "", "<s>", "</s>", "<pad>", "1", "0", "-3.5", "nan", "1e999"]
KEYS = ["prompt", "response", "chosen", "rejected", "text", "label", "margin"]

texts = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.text(max_size=40),
    st.text(st.characters(codec=None, categories=["Cs", "Lu", "Cc", "Mn"]), max_size=10),
)
numbers = st.one_of(
    st.integers(-2, 2), st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 3.5e38, 1e-400])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
keys = st.one_of(st.sampled_from(KEYS), texts)
good_row = st.fixed_dictionaries(
    {key: st.lists(st.sampled_from(WORDS[:4]), min_size=1, max_size=8).map(" ".join) for key in KEYS[:5]}
    | {"label": st.sampled_from([0, 1, "0", "1"]), "margin": st.floats(-5, 5)}
)
any_row = st.dictionaries(keys, json_values, max_size=8)


@st.composite
def spoilt_row(draw: st.DrawFn) -> dict[str, Any]:
    """A good row with a key or two taken out or given another value."""
    row = dict(draw(good_row))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        if draw(st.booleans()):
            row.pop(key, None)
        else:
            row[key] = draw(st.one_of(numbers, json_values))
    return row


rows = st.one_of(
    st.lists(good_row, min_size=1, max_size=12),
    st.lists(st.one_of(good_row, good_row, good_row, spoilt_row()), min_size=1, max_size=12),
    st.lists(st.one_of(spoilt_row(), any_row), max_size=6),
)


def as_jsonl(content: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in content)


def as_csv(content: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(content[0] if content else [])
    for row in content:
        writer.writerow([str(value).encode(errors="replace").decode() for value in row.values()])
    return out.getvalue().encode(errors="replace").decode()


def as_labelled_lines(content: list[dict[str, Any]]) -> str:
    return "\n".join(f"{row.get('label')} {str(row.get('text')).encode(errors='replace').decode()}" for row in content)


written = st.builds(
    lambda write, content: write(content), st.sampled_from([as_jsonl, json.dumps, as_csv, as_labelled_lines]), rows
)
bits = st.one_of(
    st.binary(max_size=6), st.sampled_from([b"\n", b'"', b",", b"{", b"}", b"[", b"\0", b"\xef\xbb\xbf", b"\r"])
)


@st.composite
def spoilt(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them cut off, cut out, put in, replaced or repeated."""
    content = draw(contents)
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 12)))
        before, part, after = content[:begin], content[begin:end], content[end:]
        put = draw(st.one_of(st.none(), bits, st.just(part * 3)))
        content = before if put is None else before + put + after
    return content


@st.composite
def encoded(draw: st.DrawFn) -> bytes:
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32-be"]))
    text = draw(st.one_of(written, texts))
    return text.encode(encoding, errors="replace")


plain_bytes = st.one_of(st.binary(max_size=200), encoded(), spoilt(encoded()))
packed_bytes = plain_bytes.map(lambda content: gzip.compress(content, mtime=0))
file_bytes = st.one_of(plain_bytes, packed_bytes, spoilt(packed_bytes))

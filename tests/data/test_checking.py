from __future__ import annotations

import copy

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_hybrid.data.checking import (
    Problems,
    check_tokenizer,
    lost_characters,
    notice,
    pad_id,
    report_lost_characters,
)
from lightning_hybrid.data.fields import number_field, text_field
from lightning_hybrid.data.reading import Row
from lightning_hybrid.data.tokenizing import encode_texts
from lightning_hybrid.errors import DataError


def lost(tokenizer, *texts):
    return dict(lost_characters(tokenizer, texts, encode_texts(tokenizer, texts)))


def byte_level_tokenizer(lowercase: bool = False):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(alphabet, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.normalizer = normalizers.Lowercase() if lowercase else None
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_a_missing_key_names_the_keys_that_are_there_and_a_close_one():
    problems = Problems("a.jsonl")
    text_field(Row({"promt": "x", "id": 1}, "a.jsonl:7"), "prompt", problems)
    with pytest.raises(DataError, match="a.jsonl:7: no key 'prompt'; the row has 'promt', 'id'; did you mean 'promt'?"):
        problems.raise_if_any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'prompt' must be text, found NoneType: None"),
        (3, "'prompt' must be text, found int: 3"),
        ({"from": "gpt"}, "'prompt' must be text, found dict"),
        ("a\ud800", "'prompt' holds half of a surrogate pair"),
    ],
)
def test_a_value_that_is_no_text_is_shown(value, message):
    problems = Problems("a.jsonl")
    text_field(Row({"prompt": value}, "a.jsonl:7"), "prompt", problems)
    with pytest.raises(DataError, match=message):
        problems.raise_if_any()


def test_a_value_nested_a_thousand_deep_is_still_shown():
    value: list[object] = []
    for _ in range(5_000):
        value = [value]
    problems = Problems("a.jsonl")
    text_field(Row({"prompt": value}, "a.jsonl:1"), "prompt", problems)
    with pytest.raises(DataError, match="must be text, found list"):
        problems.raise_if_any()


@pytest.mark.parametrize("value", ["high", None, [1], float("nan"), float("inf"), 10**400, "1e999"])
def test_a_margin_must_be_a_finite_number(value):
    problems = Problems("a.jsonl")
    number_field(Row({"margin": value}, "a.jsonl:1"), "margin", problems)
    with pytest.raises(DataError, match="'margin' must be a finite number that float32 can hold, found"):
        problems.raise_if_any()


def test_token_ids_beyond_the_embedding_are_refused_by_name(tokenizer):
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(DataError, match=r"2 tokens .* embedding of 47 rows: 'bright' = 47, 'dark' = 48. Use the tok"):
        check_tokenizer(tokenizer, 47)


def test_an_added_token_counts_as_one_beyond_the_embedding(tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<call>"])
    with pytest.raises(DataError, match="'<call>' = 49"):
        check_tokenizer(grown, len(tokenizer))


def test_padding_takes_the_pad_token_else_eos_else_zero(tokenizer, story_tokenizer):
    assert pad_id(tokenizer) == tokenizer.pad_token_id == 0
    assert pad_id(story_tokenizer) == story_tokenizer.unk_token_id == 0
    bare = byte_level_tokenizer()
    assert pad_id(bare) == 0
    bare.eos_token = "a"
    assert pad_id(bare) == bare.eos_token_id != 0


def test_characters_that_vanish_or_become_unknown_are_counted(story_tokenizer):
    assert lost(story_tokenizer, "she (Ann) said “hi” …", "1 * 2") == {
        **dict.fromkeys("()“”…*", 1),
    }


def test_a_lost_character_is_counted_beside_kept_ones_of_its_kind(tokenizer):
    assert lost(tokenizer, "the soup is aim .") == {"a": 1, "i": 1, "m": 1}


def test_nothing_is_lost_by_bytes_by_lower_case_or_by_white_space():
    assert lost(byte_level_tokenizer(), "naïve “quotes” 🙂\n\ttabs") == {}
    assert lost(byte_level_tokenizer(lowercase=True), "The Soup") == {}


def test_the_warning_has_the_counts_and_ten_examples(story_tokenizer, notices):
    texts = ["( ( (", "“”()[]{}…*#%^|~"]
    report_lost_characters(story_tokenizer, texts, encode_texts(story_tokenizer, texts), "a.txt")
    (message,) = notices
    assert "characters in a.txt and loses" in message
    assert "'(' ×4" in message
    assert message.count("×") == 10
    assert "\n" not in message


def test_no_warning_where_nothing_is_lost(tokenizer, notices):
    texts = ["the soup is warm ."]
    report_lost_characters(tokenizer, texts, encode_texts(tokenizer, texts), "a.txt")
    assert list(notices) == []


def test_only_rank_zero_speaks(monkeypatch, notices):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    notice("from rank 1")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    notice("from rank 0")
    assert list(notices) == ["from rank 0"]

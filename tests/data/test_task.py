from __future__ import annotations

import json
import random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from lightning_hybrid.data.task import (
    ADJECTIVES,
    BEST_GOLD,
    NOUNS,
    SEEN_AT,
    TASTE,
    TaskSizes,
    all_prompts,
    gold_score,
    sample_response,
    task_reward,
    write_task,
)
from lightning_hybrid.errors import DataError


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"), seed=1, sizes=TaskSizes(sft=1500, preferences=500, heldout=50))


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("the lemonade is cold .", 1),
        ("the soup is cold .", -1),
        ("the soup is quiet .", 0),
        ("the soup is warm . the lemonade is warm .", 0),
        ("the soup is warm . the lemonade is cold . the ice is hard . the party is soft .", 0.75),
        ("", -1),
        ("   ", -1),
        (".", -1),
        ("the soup is warm", -1),
        ("the soup is warm . the soup is", 0),
        ("the soup is warm . .", 0),
        ("soup is warm .", -1),
        ("the soup is is warm .", -1),
        ("the warm is soup .", -1),
        ("the market is warm .", -1),
        ("the soup is <eos> warm .", -1),
    ],
)
def test_the_gold_score_is_the_mean_over_clauses(response, score):
    assert gold_score(response) == score


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.sampled_from(["the", "is", ".", "soup", "warm", "mia"]), max_size=20).map(" ".join))
def test_the_gold_score_of_any_text_is_between_minus_one_and_one(response):
    assert -1.0 <= gold_score(response) <= BEST_GOLD


def test_an_adjective_is_good_for_some_things_and_bad_for_others():
    for adjective in ADJECTIVES:
        assert {adjective in good for good, _ in TASTE.values()} == {True, False}
        assert any(adjective in bad for _, bad in TASTE.values())
    for good, bad in TASTE.values():
        assert len(set(good + bad)) == 4
        assert set(good + bad) <= set(ADJECTIVES)


def test_the_best_response_reaches_the_best_score():
    assert max(gold_score(f"the {noun} is {adjective} .") for noun in NOUNS for adjective in ADJECTIVES) == BEST_GOLD


def test_the_reward_is_the_gold_score_of_each_response():
    assert task_reward(["a", "b"], ["the ice is hard .", ""]) == [1.0, -1.0]


def test_samples_follow_the_grammar_have_mean_gold_zero_and_depend_on_the_place():
    draw = random.Random(0)
    samples = [sample_response("mia visits the market .", draw) for _ in range(3000)]
    assert all(2 <= sample.count(".") <= 5 and "is" in sample for sample in samples)
    assert abs(mean(map(gold_score, samples))) < 0.03
    nouns = [clause.split()[1] for sample in samples for clause in sample.split(" .")[:-1]]
    assert 0.8 < mean(noun in SEEN_AT["market"] for noun in nouns) < 0.87
    assert set(nouns) == set(NOUNS)


def test_the_same_seed_writes_the_same_files_and_another_one_others(tmp_path):
    sizes = TaskSizes(sft=50, preferences=50, heldout=10)
    written = [write_task(tmp_path / str(index), seed, sizes) for index, seed in enumerate((5, 5, 6))]
    for name in ("sft", "preferences", "prompts", "heldout"):
        one, same, other = (getattr(task, name).read_text() for task in written)
        assert one == same != other


def test_the_files_have_the_sizes_asked_for_and_heldout_prompts_are_nowhere_else(files):
    counts = [len(rows(path)) for path in (files.sft, files.preferences, files.prompts, files.heldout)]
    assert counts == [1500, 500, 270, 50]
    heldout = {row["prompt"] for row in rows(files.heldout)}
    assert len(heldout) == 50
    for path in (files.sft, files.preferences, files.prompts):
        assert heldout.isdisjoint(row["prompt"] for row in rows(path))


def test_preferences_are_ordered_by_gold_score_and_the_supervised_texts_are_neutral(files):
    assert all(gold_score(row["chosen"]) > gold_score(row["rejected"]) for row in rows(files.preferences))
    assert abs(mean(gold_score(row["response"]) for row in rows(files.sft))) < 0.05


def test_the_saved_tokenizer_brings_back_every_sentence_exactly(files):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.tokenizer)
    texts = [*all_prompts(), *(row["response"] for row in rows(files.sft)[:300])]
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts] == texts
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)
    ids = tokenizer("the soup is warm .")["input_ids"] + [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the soup is warm ."
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1


def test_all_three_data_modules_read_the_task_without_a_word(files, tokenizer, notices):
    for module in (
        InstructionDataModule(str(files.sft), tokenizer=tokenizer, max_length=64),
        PreferenceDataModule(str(files.preferences), tokenizer=tokenizer, max_length=64, prompt_key="prompt"),
        PromptDataModule(str(files.prompts), tokenizer=tokenizer, max_length=64, max_new_tokens=32),
    ):
        assert next(iter(module.train_dataloader()))
    assert list(notices) == []


@pytest.mark.parametrize("heldout", [0, 320])
def test_a_task_without_prompts_for_both_sides_is_refused(tmp_path, heldout):
    with pytest.raises(DataError, match=f"heldout is {heldout}, but the task has 320 prompts: 1 to 319"):
        write_task(tmp_path, sizes=TaskSizes(heldout=heldout))

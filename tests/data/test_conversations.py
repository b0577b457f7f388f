"""Conversations through the data modules: what each kind of batch learns of them."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule, UnpairedDataModule
from lightning_hybrid.errors import DataError


@pytest.fixture
def stories(story_tokenizer):
    """A real tokenizer without a template, which a test may give one."""
    return copy.deepcopy(story_tokenizer)


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def learned(tokenizer, batch, row=0):
    return tokenizer.decode(batch["input_ids"][row][batch["loss_mask"][row]])


def test_every_answer_of_a_conversation_is_learned(write, stories) -> None:
    name = write("a.jsonl", [{"messages": turns("Hi", "Hello", "Bye", "So long")}])
    module = InstructionDataModule(name, tokenizer=stories, template="plain")
    (batch,) = module.train_dataloader()
    eos = stories.eos_token
    assert learned(stories, batch).split() == ["Hello" + eos, "So", "long" + eos]
    assert batch["input_ids"][0].tolist().count(stories.bos_token_id) == 1


def test_the_template_that_was_given_goes_with_the_tokenizer(write, stories, tmp_path) -> None:
    name = write("a.jsonl", [{"messages": turns("Hi", "Hello")}])
    InstructionDataModule(name, tokenizer=stories, template="plain").setup()
    stories.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    rendered = AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(
        turns("Hi"), tokenize=False, add_generation_prompt=True
    )
    assert rendered == f"{stories.bos_token}\n\nHuman: Hi\n\nAssistant:"


def test_a_missing_template_is_an_error_with_the_fix(write, stories) -> None:
    name = write("a.jsonl", [{"messages": turns("Hi", "Hello")}])
    with pytest.raises(DataError, match="the tokenizer has no chat template: set template to chatml or plain"):
        InstructionDataModule(name, tokenizer=stories).setup()


def test_a_prompt_of_turns_ends_where_the_answer_begins_and_keeps_the_other_columns(write, stories) -> None:
    rows = [{"prompt": turns("Hi", "Hello", "Bye"), "answer": n, "tag": "x"} for n in (4, 5)]
    module = PromptDataModule(write("a.jsonl", rows), tokenizer=stories, template="plain", batch_size=2)
    (batch,) = module.train_dataloader()
    text = f"\n\nHuman: Hi\n\nAssistant: Hello{stories.eos_token}\n\nHuman: Bye\n\nAssistant:"
    assert batch["prompts"] == [text, text]
    assert sorted(batch["fields"]["answer"]) == [4, 5]
    assert batch["fields"]["tag"] == ["x", "x"]


def test_a_column_that_some_rows_lack_is_none_for_them(write, tokenizer) -> None:
    rows = [{"prompt": "mia visits", "answer": 4}, {"prompt": "mia visits", "level": 1}]
    module = PromptDataModule(write("a.jsonl", rows), tokenizer=tokenizer, batch_size=2, schema="keys")
    (batch,) = module.train_dataloader()
    fields = batch["fields"]
    assert {*zip(fields["answer"], fields["level"], strict=True)} == {(4, None), (None, 1)}


def test_both_answers_of_a_pair_are_masked_after_the_prompt_that_they_share(write, stories) -> None:
    name = write("a.jsonl", [{"prompt": turns("Hi"), "chosen": "Hello", "rejected": "Go away"}])
    (batch,) = PreferenceDataModule(name, tokenizer=stories, template="plain").train_dataloader()
    prompts = [batch[side]["input_ids"][0][~batch[side]["loss_mask"][0]] for side in ("chosen", "rejected")]
    assert torch.equal(*prompts)
    assert learned(stories, batch["chosen"]).strip() == "Hello" + stories.eos_token
    assert learned(stories, batch["rejected"]).strip() == "Go away" + stories.eos_token


def test_a_truncated_pair_keeps_bos_and_what_is_learned_of_its_end(write, tokenizer) -> None:
    name = write("a.jsonl", [{"prompt": "mia visits the market .", "chosen": "the ice .", "rejected": "the " * 20}])
    module = PreferenceDataModule(
        name, tokenizer=tokenizer, prompt_key="prompt", max_length=8, too_long="truncate", schema="keys"
    )
    (batch,) = module.train_dataloader()
    assert tokenizer.decode(batch["chosen"]["input_ids"][0]) == "<bos> the market . the ice . <eos>"
    assert batch["chosen"]["loss_mask"][0].tolist() == [False] * 4 + [True] * 4
    assert batch["rejected"]["loss_mask"][0].tolist() == [False] + [True] * 7


def test_labelled_responses_come_with_their_labels(write, tokenizer) -> None:
    rows = [{"prompt": "mia visits", "completion": text, "label": good} for text, good in (("the ice", 1), ("soup", 0))]
    (batch,) = UnpairedDataModule(write("a.jsonl", rows), tokenizer=tokenizer).train_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "loss_mask", "desirable"}
    found = {bool(good): learned(tokenizer, batch, row) for row, good in enumerate(batch["desirable"])}
    assert found == {True: "the ice <eos>", False: "soup <eos>"}


def test_responses_of_one_label_alone_are_refused(write, tokenizer) -> None:
    rows = [{"prompt": "mia visits", "completion": "the ice", "label": True}] * 2
    with pytest.raises(DataError, match="of both labels are needed, but .* has 2 desirable and 0 undesirable ones"):
        UnpairedDataModule(write("a.jsonl", rows), tokenizer=tokenizer).setup()


def test_real_sharegpt_pairs_pass_through_a_template(shared, stories) -> None:
    module = PreferenceDataModule(
        str(shared / "data/llamafactory_dpo_en_demo.json"),
        tokenizer=stories,
        template="plain",
        limit=40,
        max_length=512,
        too_long="truncate",
    )
    for batch in module.train_dataloader():
        for side in (batch["chosen"], batch["rejected"]):
            last = side["attention_mask"].sum(1) - 1
            rows = torch.arange(len(last))
            assert (side["input_ids"][rows, last] == stories.eos_token_id).all()
            assert side["loss_mask"][rows, last].all()
            assert (side["input_ids"][:, 0] == stories.bos_token_id).all()

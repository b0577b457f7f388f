from __future__ import annotations

import copy
import json

import pytest

from lightning_hybrid.data import PromptDataModule
from lightning_hybrid.data.mixing import Order
from lightning_hybrid.errors import ConfigError, DataError

ROWS = [{"prompt": text} for text in ("mia visits the market .", "tom leaves the farm .", "ada sees the hotel .")]


def all_prompts(module):
    return [text for batch in module.train_dataloader() for text in batch["prompts"]]


def test_a_batch_is_lists_of_ids_texts_and_places(write, tokenizer):
    module = PromptDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, batch_size=3)
    (batch,) = module.train_dataloader()
    assert set(batch) == {"prompt_ids", "prompts", "index", "fields"}
    assert [ROWS[index]["prompt"] for index in batch["index"]] == batch["prompts"]
    assert [tokenizer.decode(ids) for ids in batch["prompt_ids"]] == [f"<bos> {text}" for text in batch["prompts"]]


def test_training_batches_are_always_full_and_validation_leaves_nothing_out(write, tokenizer):
    name = write("a.jsonl", ROWS)
    module = PromptDataModule(name, tokenizer=tokenizer, batch_size=2, validation_path=name)
    assert [len(batch["prompts"]) for batch in module.train_dataloader()] == [2]
    assert [len(batch["prompts"]) for batch in module.val_dataloader()] == [2, 1]


def test_fewer_prompts_than_a_batch_is_an_error_with_numbers(write, tokenizer):
    module = PromptDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, batch_size=4)
    with pytest.raises(DataError, match=r"gives 3 prompts, fewer than one batch: batch_size 4 × 1 ranks = 4; lower"):
        module.setup()


def test_the_first_words_are_the_prompt_and_repeated_ones_are_counted(write, tokenizer, notices):
    name = write("a.txt", "mia  visits the farm .\nmia visits the hotel .\ntom\n")
    module = PromptDataModule(name, tokenizer=tokenizer, prompt_key="text", first_words=2, batch_size=2)
    assert sorted(all_prompts(module)) == ["mia visits", "tom"]
    (message,) = notices
    assert "1 of 3 prompts of" in message
    assert message.endswith("dropped: repeated after first_words")


def test_repeated_prompts_stay_when_they_are_not_cut(write, tokenizer):
    module = PromptDataModule(write("a.jsonl", ROWS[:1] * 3), tokenizer=tokenizer, batch_size=1)
    assert len(all_prompts(module)) == 3


def test_a_prompt_without_room_for_new_tokens_is_an_error_that_names_it(write, tokenizer):
    rows = [*ROWS, {"prompt": "the " * 10}]
    module = PromptDataModule(
        write("a.jsonl", rows), tokenizer=tokenizer, max_length=16, max_new_tokens=10, too_long="error"
    )
    with pytest.raises(DataError, match=r"a.jsonl:4: 11 tokens \+ max_new_tokens 10 > max_length 16"):
        module.setup()


def test_or_it_is_dropped_and_counted_or_loses_its_beginning(write, tokenizer, notices):
    name = write("a.jsonl", [*ROWS, {"prompt": f"tom {'the ' * 9}soup"}])
    options = {"tokenizer": tokenizer, "max_length": 16, "max_new_tokens": 10, "batch_size": 1}
    assert len(all_prompts(PromptDataModule(name, **options))) == 3
    assert ["1 too long (tokens + max_new_tokens 10 > max_length 16)" in message for message in notices] == [True]
    cut = PromptDataModule(name, too_long="truncate", **options)
    ids = {tokenizer.decode(batch["prompt_ids"][0]) for batch in cut.train_dataloader()}
    assert "<bos> the the the the soup" in ids


def test_new_tokens_that_fill_all_positions_are_refused(write, tokenizer):
    module = PromptDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, max_length=64, max_new_tokens=64)
    with pytest.raises(DataError, match="max_new_tokens 64 leaves no room for a prompt within max_length 64"):
        module.setup()


def test_prompts_that_are_all_too_long_leave_nothing(write, tokenizer):
    module = PromptDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, max_length=12, max_new_tokens=8)
    with pytest.raises(
        DataError, match=r"nothing is left of the 3 rows .* 3 too long \(tokens \+ max_new_tokens 8 > max"
    ):
        module.setup()


def test_empty_prompts_are_dropped_and_counted(write, tokenizer, notices):
    module = PromptDataModule(write("a.jsonl", [*ROWS, {"prompt": " "}]), tokenizer=tokenizer, batch_size=1)
    assert len(all_prompts(module)) == 3
    assert [message.endswith("dropped: 1 with an empty prompt") for message in notices] == [True]


@pytest.mark.parametrize("name", ["first_words", "max_new_tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be 1 or more, found 0"):
        PromptDataModule("a.jsonl", **{name: 0})


def test_no_prompt_is_both_for_training_and_for_validation(write, tokenizer):
    lines = "".join(f"mia {'visits ' * (n % 20)}. {'the ' * n}\n" for n in range(200))
    module = PromptDataModule(
        write("a.txt", lines),
        tokenizer=tokenizer,
        prompt_key="text",
        first_words=15,
        validation_fraction=0.3,
        batch_size=1,
    )
    held_out = {text for batch in module.val_dataloader() for text in batch["prompts"]}
    assert held_out
    assert held_out.isdisjoint(all_prompts(module))


def test_rt_polarity_gives_prompts_of_first_words(shared, story_tokenizer):
    module = PromptDataModule(
        [str(shared / "data/rt-polarity.pos"), str(shared / "data/rt-polarity.neg")],
        tokenizer=story_tokenizer,
        format="lines",
        encoding="latin-1",
        prompt_key="text",
        first_words=4,
        max_length=512,
        max_new_tokens=32,
    )
    prompts = all_prompts(module)
    assert 9_000 < len(prompts) < 10_662
    assert len(set(prompts)) == len(prompts)


QUESTION = (
    "{% for message in messages %}{{ 'Question: ' + message.content + '\nAnswer:' }}{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)


def test_gsm8k_gives_its_questions_with_the_answers_as_a_field_in_any_form_of_prompt(shared, story_tokenizer, tmp_path):
    path = shared / "data/gsm8k_train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:50]]
    (tmp_path / "question.jinja").write_text(QUESTION)
    stories = copy.deepcopy(story_tokenizer)  # which is given a template
    options = {"limit": 50, "batch_size": 10, "max_length": 512, "max_new_tokens": 16, "tokenizer": stories}
    for form, in_turns in (
        ("{}", {}),
        ("Question: {}\nAnswer:", {"chat": True, "template": f"{tmp_path}/question.jinja"}),
    ):
        batches = list(PromptDataModule(str(path), **options, **in_turns).train_dataloader())
        places = [index for batch in batches for index in batch["index"]]
        assert sorted(places) == list(range(50))
        assert [text for batch in batches for text in batch["prompts"]] == [
            form.format(rows[i]["question"]) for i in places
        ]
        assert [gold for batch in batches for gold in batch["fields"]["answer"]] == [rows[i]["answer"] for i in places]
        assert all(
            set(batch["fields"]) == ({"answer", "prompt_turns"} if in_turns else {"answer"}) for batch in batches
        )


def show_prompts_of_each_rank(name: str) -> None:
    import lightning as L
    import torch

    from lightning_hybrid.data.task import build_tokenizer

    class Seen(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.tokenizer = build_tokenizer()
            self.automatic_optimization = False
            self.seen = []

        def training_step(self, batch, index):
            self.seen += batch["index"]

        def configure_optimizers(self):
            return None

    module = Seen()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PromptDataModule(name, batch_size=5, seed=7))
    print(json.dumps(module.seen))


def test_two_ranks_share_the_prompts_and_shuffle_them_in_each_epoch(write, run_ranks):
    name = write("a.jsonl", [{"prompt": "the " * (n + 1)} for n in range(20)])
    one, two = (json.loads(output.splitlines()[-1]) for output in run_ranks(show_prompts_of_each_rank, 2, name))
    assert sorted(one[:10] + two[:10]) == sorted(one[10:] + two[10:]) == list(range(20))
    assert one[:10] != one[10:]
    for rank, seen in enumerate((one, two)):
        assert seen == [index for epoch in (0, 1) for index in Order([[20]], None, 7, epoch, 2, rank)]

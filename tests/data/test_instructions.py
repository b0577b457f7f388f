from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.errors import ConfigError, DataError

ROWS = [
    {"prompt": "mia visits the market .", "response": "the soup is warm ."},
    {"prompt": "tom leaves the farm .", "response": "the garden is bright . the ice is soft ."},
]


def batches(module):
    module.setup("fit")
    return list(module.train_dataloader())


def test_a_batch_is_padded_on_the_right_and_learns_responses_and_their_eos_only(write, tokenizer):
    (batch,) = batches(InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 17)),
        "attention_mask": (torch.bool, (2, 17)),
        "loss_mask": (torch.bool, (2, 17)),
    }
    short = int(batch["attention_mask"].sum(1).argmin())
    ids, mask, loss = (batch[name][short] for name in ("input_ids", "attention_mask", "loss_mask"))
    assert mask.tolist() == [True] * 12 + [False] * 5
    assert tokenizer.decode(ids[mask & ~loss]) == "<bos> mia visits the market ."
    assert tokenizer.decode(ids[loss]) == "the soup is warm . <eos>"


def test_prompt_and_response_are_tokenised_apart(write, story_tokenizer):
    name = write("a.jsonl", [{"prompt": "Once upon a ti", "response": "me there was"}])
    (batch,) = batches(InstructionDataModule(name, tokenizer=story_tokenizer))
    apart = [
        story_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Once upon a ti", "me there was")
    ]
    assert batch["input_ids"][0].tolist() == [1, *apart[0], *apart[1], 2]
    assert batch["loss_mask"][0].sum() == len(apart[1]) + 1


def test_bos_and_eos_already_in_the_text_are_not_repeated(write, tokenizer):
    name = write("a.jsonl", [{"prompt": "<bos> mia", "response": "the soup <eos>"}])
    (batch,) = batches(InstructionDataModule(name, tokenizer=tokenizer))
    assert tokenizer.decode(batch["input_ids"][0]) == "<bos> mia the soup <eos>"


def test_bos_and_eos_can_be_left_out(write, tokenizer):
    module = InstructionDataModule(write("a.jsonl", ROWS[:1]), tokenizer=tokenizer, add_eos=False, bos=False)
    assert tokenizer.decode(batches(module)[0]["input_ids"][0]) == "mia visits the market . the soup is warm ."


@pytest.mark.parametrize("padding", [{"pad_token": None}, {"pad_token": "<eos>"}, {"pad_token": "<unk>"}])
def test_any_padding_token_will_do_as_masks_decide(write, padding):
    from lightning_hybrid.data.task import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.pad_token = padding["pad_token"]
    (batch,) = batches(InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer))
    lengths = batch["attention_mask"].sum(1)
    assert sorted(lengths.tolist()) == [12, 17]
    last = batch["input_ids"][torch.arange(2), lengths - 1]
    assert last.tolist() == [tokenizer.eos_token_id] * 2
    assert batch["loss_mask"][torch.arange(2), lengths - 1].all()


def test_a_tokenizer_without_eos_is_refused_when_eos_is_wanted(write):
    from lightning_hybrid.data.task import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    name = write("a.jsonl", ROWS)
    with pytest.raises(DataError, match="no EOS token, so no response could end: set one, or add_eos=False"):
        InstructionDataModule(name, tokenizer=tokenizer).setup()
    InstructionDataModule(name, tokenizer=tokenizer, add_eos=False).setup()


def test_whole_lines_are_learned_without_a_prompt_key(write, tokenizer):
    module = InstructionDataModule(
        write("a.txt", "the soup is warm .\n"), tokenizer=tokenizer, prompt_key=None, response_key="text"
    )
    (batch,) = batches(module)
    assert batch["loss_mask"].tolist() == [[False, True, True, True, True, True, True]]


def test_too_long_rows_are_dropped_and_counted(write, tokenizer, notices):
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, max_length=12)
    assert len(batches(module)[0]["input_ids"]) == 1
    (message,) = notices
    assert "1 of 2 rows of" in message
    assert "1 too long (tokens > max_length 12)" in message


def test_truncating_cuts_the_end_and_drops_rows_without_a_response_left(write, tokenizer, notices):
    rows = [*ROWS, {"prompt": "the " * 12, "response": "soup"}]
    module = InstructionDataModule(write("a.jsonl", rows), tokenizer=tokenizer, max_length=12, too_long="truncate")
    (batch,) = batches(module)
    assert batch["input_ids"].shape == (2, 12)
    assert sorted((batch["input_ids"][:, -1] == tokenizer.eos_token_id).tolist()) == [False, True]
    assert ["1 with a prompt that leaves no token of response within max_length 12" in m for m in notices] == [True]


def test_too_long_rows_can_be_an_error_that_names_them(write, tokenizer):
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, max_length=12, too_long="error")
    with pytest.raises(DataError, match=r"a.jsonl:2: 17 tokens > max_length 12; shorten it, or set too_long"):
        module.setup()


def test_nothing_left_is_an_error_that_says_why(write, tokenizer):
    module = InstructionDataModule(write("a.jsonl", [*ROWS, {"prompt": "", "response": ""}]), tokenizer=tokenizer)
    module.max_length = 3
    with pytest.raises(
        DataError, match=r"nothing is left of the 3 rows of .*: 2 too long .*; 1 with an empty response"
    ):
        module.setup()


def test_all_rows_without_their_keys_come_in_one_error(write, tokenizer):
    rows = [ROWS[0], {"prompt": "mia", "responses": "x"}, {"prompt": 3, "response": "x"}]
    with pytest.raises(
        DataError, match=r"(?s)2 problems.*:2: no key 'response'.*mean 'responses'.*:3: 'prompt' must be"
    ):
        InstructionDataModule(write("a.jsonl", rows), tokenizer=tokenizer).setup()


def test_characters_the_tokenizer_drops_are_reported_once(write, story_tokenizer, notices):
    name = write("a.jsonl", [{"prompt": "(a)", "response": "“b”"}])
    InstructionDataModule(name, tokenizer=story_tokenizer).setup()
    (message,) = notices
    assert "has no token for 4 of the characters" in message


def test_no_tokenizer_is_an_error(write):
    with pytest.raises(ConfigError, match="InstructionDataModule has no tokenizer: pass tokenizer="):
        InstructionDataModule(write("a.jsonl", ROWS)).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, found 0"),
        ({"limit": -1}, "limit must be 1 or more, found -1"),
        ({"too_long": "cut"}, "too_long must be one of drop, truncate, error, found 'cut'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, found 1.0"),
        ({"validation_fraction": 0.1, "validation_path": "b"}, "are both set: choose one"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        InstructionDataModule("a.jsonl", **options)


def test_the_same_seed_gives_the_same_order_and_another_one_another(write, tokenizer):
    name = write("a.jsonl", [{"prompt": "mia", "response": "the " * n} for n in range(1, 30)])

    def order(seed):
        return [
            int(b["loss_mask"].sum())
            for b in batches(InstructionDataModule(name, tokenizer=tokenizer, batch_size=1, seed=seed))
        ]

    assert order(1) == order(1) != order(2)


def test_files_may_be_named_by_paths(write, tokenizer):
    train, held_out = Path(write("a.jsonl", ROWS)), Path(write("b.jsonl", ROWS[:1]))
    module = InstructionDataModule([train, str(held_out)], tokenizer=tokenizer, validation_path=held_out, mix=[1, 1])
    assert len(batches(module)[0]["input_ids"]) == 3
    assert len(next(iter(module.val_dataloader()))["input_ids"]) == 1
    assert len(batches(InstructionDataModule(train, tokenizer=tokenizer, streaming=True))[0]["input_ids"]) == 2


def test_no_row_is_longer_than_the_positions_of_the_model(write, tokenizer, notices):
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, max_length=100)
    trained = SimpleNamespace(tokenizer=tokenizer, max_positions=12)
    module.trainer = SimpleNamespace(lightning_module=trained, world_size=1, global_rank=0, current_epoch=0)
    assert len(batches(module)[0]["input_ids"]) == 1
    assert ["1 too long (tokens > max_length 12)" in message for message in notices] == [True]


def test_limit_takes_the_first_rows(write, tokenizer):
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, limit=1)
    assert tokenizer.decode(batches(module)[0]["input_ids"][0]).startswith("<bos> mia")


def test_a_row_keeps_its_side_of_the_split_when_rows_are_reordered_or_added(write, tokenizer):
    rows = [{"prompt": "mia", "response": f"{'the ' * n}soup"} for n in range(1, 60)]

    def held_out(rows):
        module = InstructionDataModule(
            write("a.jsonl", rows), tokenizer=tokenizer, validation_fraction=0.3, batch_size=99
        )
        module.setup()
        assert len(batches(module)[0]["input_ids"]) + len(next(iter(module.val_dataloader()))["input_ids"]) == len(rows)
        return {int(n) for n in next(iter(module.val_dataloader()))["loss_mask"].sum(1)}

    assert 5 < len(held_out(rows)) < 35
    assert held_out(rows) == held_out(rows[::-1])
    assert held_out(rows[:40]) <= held_out(rows)


def test_a_split_that_leaves_a_side_empty_is_an_error(write, tokenizer):
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, validation_fraction=1e-9)
    with pytest.raises(DataError, match="leaves 2 rows for training and 0 for validation of the 2 in"):
        module.setup()


def test_validation_rows_come_from_their_own_file_or_there_are_none(write, tokenizer):
    train, other = write("a.jsonl", ROWS), write("b.jsonl", ROWS[1:])
    assert InstructionDataModule(train, tokenizer=tokenizer).val_dataloader() == []
    module = InstructionDataModule(train, tokenizer=tokenizer, validation_path=other)
    assert [len(batch["input_ids"]) for batch in module.val_dataloader()] == [1]


def test_gsm8k_is_read_as_instructions(shared, story_tokenizer, notices):
    module = InstructionDataModule(
        str(shared / "data/gsm8k_train.jsonl"),
        tokenizer=story_tokenizer,
        prompt_key="question",
        response_key="answer",
        max_length=512,
        limit=500,
    )
    (batch, *_) = batches(module)
    assert (batch["loss_mask"].sum(1) > 1).all()
    assert any("has no token for" in message for message in notices)

from __future__ import annotations

import pickle

import pytest
import torch

from lightning_hybrid.data import PreferenceDataModule
from lightning_hybrid.data.preferences import PairDataset
from lightning_hybrid.errors import ConfigError, DataError

ROWS = [
    {
        "prompt": "mia visits the market .",
        "chosen": "the soup is warm .",
        "rejected": "the soup is cold . the",
        "by": 2,
    },
    {"prompt": "tom leaves the farm .", "chosen": "the ice is hard .", "rejected": "the ice is soft .", "by": "0.5"},
]
LABELLED = (
    "1 the soup is warm .\n0 the soup is cold .\n1 the ice is hard .\n0 the ice is soft .\n0 the soup is hard .\n"
)


def first_batch(module):
    module.setup("fit")
    return next(iter(module.train_dataloader()))


def texts(module, side):
    return [
        module.tokenizer.decode(ids[mask]) for ids, mask in zip(side["input_ids"], side["attention_mask"], strict=True)
    ]


def test_both_sides_hold_bos_prompt_response_and_eos(write, tokenizer):
    module = PreferenceDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, prompt_key="prompt", margin_key="by")
    batch = first_batch(module)
    assert batch["chosen"]["input_ids"].shape == (2, 12)
    assert batch["rejected"]["attention_mask"].shape == (2, 13)
    assert batch["rejected"]["attention_mask"].dtype == torch.bool
    assert batch["margin"].dtype == torch.float32
    mia = texts(module, batch["chosen"]).index("<bos> mia visits the market . the soup is warm . <eos>")
    assert texts(module, batch["rejected"])[mia] == "<bos> mia visits the market . the soup is cold . the <eos>"
    assert batch["margin"][mia] == 2


def test_whole_texts_need_no_prompt_and_rows_without_margin_give_none(write, tokenizer):
    batch = first_batch(PreferenceDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer))
    assert set(batch) == {"chosen", "rejected"}


def test_rows_with_equal_or_empty_texts_are_dropped_and_counted(write, tokenizer, notices):
    rows = [*ROWS, {"chosen": "the", "rejected": " the"}, {"chosen": "", "rejected": "the"}]
    module = PreferenceDataModule(write("a.jsonl", rows), tokenizer=tokenizer)
    assert len(first_batch(module)["chosen"]["input_ids"]) == 2
    (message,) = notices
    assert message.endswith("dropped: 1 with the same tokens in both texts; 1 with an empty text")


def test_truncating_keeps_bos_and_the_end_where_the_texts_differ(write, tokenizer):
    module = PreferenceDataModule(
        write("a.jsonl", ROWS[:1]), tokenizer=tokenizer, prompt_key="prompt", max_length=7, too_long="truncate"
    )
    batch = first_batch(module)
    assert texts(module, batch["chosen"]) == ["<bos> the soup is warm . <eos>"]
    assert texts(module, batch["rejected"]) == ["<bos> soup is cold . the <eos>"]


def test_a_row_whose_text_is_no_text_is_named(write, tokenizer):
    rows = [ROWS[0], {"chosen": {"from": "gpt", "value": "x"}, "rejected": "y"}]
    with pytest.raises(DataError, match=r"a.jsonl:2: 'chosen' must be text, found dict"):
        PreferenceDataModule(write("a.jsonl", rows), tokenizer=tokenizer).setup()


def test_labelled_rows_give_positive_over_negative_pairs(write, tokenizer):
    module = PreferenceDataModule(
        write("a.train", LABELLED),
        tokenizer=tokenizer,
        format="labelled_lines",
        pairing="labels",
        pairs=64,
        batch_size=64,
    )
    batch = first_batch(module)
    assert set(texts(module, batch["chosen"])) == {"<bos> the soup is warm . <eos>", "<bos> the ice is hard . <eos>"}
    assert len(set(texts(module, batch["rejected"]))) == 3
    assert len(batch["chosen"]["input_ids"]) == 64


def test_an_epoch_has_as_many_pairs_as_rows_unless_said_otherwise(write, tokenizer):
    module = PreferenceDataModule(
        write("a.train", LABELLED), tokenizer=tokenizer, format="labelled_lines", pairing="labels"
    )
    assert len(module.train_dataloader().dataset) == 5


def test_pairs_are_drawn_anew_in_each_epoch_and_the_same_in_every_process():
    sides = [[index] for index in range(50)], [[100 + index] for index in range(50)]
    epoch = 0
    pairs = PairDataset(*sides, pairs=20, seed=3, epoch=lambda: epoch)
    first = [pairs[index] for index in range(20)]
    epoch = 1
    second = [pairs[index] for index in range(20)]
    assert first != second
    assert [PairDataset(*sides, pairs=20, seed=3)[index] for index in range(20)] == first
    worker = pickle.loads(pickle.dumps(pairs))
    epoch = 2
    assert [worker[index] for index in range(20)] == second


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_sees_other_pairs_in_the_next_epoch(write, tokenizer, num_workers):
    import lightning as L

    class Seen(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.tokenizer = tokenizer
            self.rows = {0: [], 1: []}

        def training_step(self, batch, index):
            for side in ("chosen", "rejected"):
                self.rows[self.trainer.current_epoch] += texts(self, batch[side])

        def configure_optimizers(self):
            return None

    lines = "".join(f"{n % 2} {'the ' * n}soup\n" for n in range(1, 40))
    module = Seen()
    data = PreferenceDataModule(
        write("a.train", lines), format="labelled_lines", pairing="labels", num_workers=num_workers
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert len(module.rows[0]) == len(module.rows[1]) == 78
    assert sorted(module.rows[0]) != sorted(module.rows[1])


def test_labels_other_than_zero_and_one_are_named(write, tokenizer):
    name = write("a.jsonl", [{"text": "the", "label": 1}, {"text": "is", "label": 2}, {"text": "soup"}])
    with pytest.raises(DataError, match=r"(?s):2: 'label' must be 0 .* found 2.*:3: 'label' must .* no such key"):
        PreferenceDataModule(name, tokenizer=tokenizer, pairing="labels").setup()


def test_labels_of_one_kind_make_no_pairs(write, tokenizer):
    name = write("a.csv", "text,label\nthe,1\nsoup,1\n")
    with pytest.raises(DataError, match=r"need texts of both labels, but .*a.csv has 2 positive \(1\) and 0 negative"):
        PreferenceDataModule(name, tokenizer=tokenizer, pairing="labels").setup()


def test_validation_texts_are_those_kept_for_validation(write, tokenizer):
    train, dev = write("a.train", LABELLED), write("a.dev", "1 the soup\n0 the ice\n0 the lesson\n")
    module = PreferenceDataModule(
        train, tokenizer=tokenizer, format="labelled_lines", pairing="labels", validation_path=dev
    )
    assert module.validation_texts() == (["the soup"], ["the ice", "the lesson"])
    assert [tokenizer.decode(ids) for ids in module.encode(["the soup"])] == ["<bos> the soup <eos>"]
    fixed = [[batch["rejected"]["input_ids"].tolist() for batch in module.val_dataloader()] for _ in range(2)]
    assert fixed[0] == fixed[1]


def test_validation_texts_need_labels(write, tokenizer):
    module = PreferenceDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer)
    with pytest.raises(DataError, match="no labelled texts for validation: pairing is 'rows'"):
        module.validation_texts()


def test_pairs_and_mix_do_not_both_decide_the_length_of_an_epoch():
    with pytest.raises(ConfigError, match="pairs and mix both decide how long an epoch is: unset pairs, or mix"):
        PreferenceDataModule(["a.csv", "b.csv"], pairing="labels", pairs=8, mix=[1, 1])


def test_an_unknown_pairing_is_refused():
    with pytest.raises(ConfigError, match="pairing must be one of rows, labels, found 'random'"):
        PreferenceDataModule("a.jsonl", pairing="random")


def test_hh_transcripts_beyond_the_positions_are_counted(shared, story_tokenizer, notices):
    module = PreferenceDataModule(
        str(shared / "data/hh_rlhf_harmless_base_test.jsonl.gz"), tokenizer=story_tokenizer, max_length=512
    )
    batch = first_batch(module)
    assert max(batch[side]["input_ids"].shape[1] for side in ("chosen", "rejected")) <= 512
    kept = len(module.train_dataloader().dataset)
    assert 0 < kept < 2312
    assert any(f"{2312 - kept:,} of 2,312 rows" in message and "too long" in message for message in notices)


def test_sst2_gives_pairs_for_training_and_all_texts_for_validation(shared, story_tokenizer):
    module = PreferenceDataModule(
        str(shared / "data/sst2_stsa.binary.train"),
        tokenizer=story_tokenizer,
        format="labelled_lines",
        pairing="labels",
        validation_path=str(shared / "data/sst2_stsa.binary.dev"),
        max_length=512,
    )
    positive, negative = module.validation_texts()
    assert (len(positive), len(negative)) == (444, 428)
    assert len(module.train_dataloader().dataset) == 6920

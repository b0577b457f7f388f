"""A reward model in PPO is given the tokens that it was trained on, whatever its data module made of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import ClassifierConfig, RewardConfig
from lightning_hybrid.data import PreferenceDataModule, PromptDataModule
from lightning_hybrid.data.templates import TURNS, use_template
from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.models import (
    ScalarModel,
    build_policy,
    last_value,
    load_scalar,
    load_tokenizer,
    scalar_from_policy,
)
from lightning_hybrid.modules import RewardModule
from lightning_hybrid.modules.scoring import reward_scores
from lightning_hybrid.rewards import CachedReward, LearnedReward
from lightning_hybrid.rewards.cache import MemoryStore
from lightning_hybrid.rewards.classifier import load_classifier
from tests.helpers import TINY_LLAMA, quiet_trainer, tiny_policy
from tests.rewards.chats import byte_pairs, said
from tests.rewards.classifiers import save_classifier
from tests.rewards.test_classifier import plain_logits

# Its space belongs to the word behind it, where both are read as one text.
ASKED = ["the answer is ", "is it bad? it is "]
ANSWERS = [("good", "bad"), ("bad, he said", "all good")]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "is it good?"}],
    [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": "it is"},
        {"role": "user", "content": "good?"},
    ],
]
APART: dict[str, Any] = {"prompt_key": "prompt", "schema": "keys"}
FORMS = {
    "apart": (ASKED, APART),
    "apart without bos and eos": (ASKED, APART | {"bos": False, "add_eos": False}),
    "whole": (ASKED, {"chosen_key": "better", "rejected_key": "worse"}),
    "chatml": (CHATS, {"template": "chatml"}),
    "plain": (CHATS, {"template": "plain"}),
    "merged system": (CHATS, {"template": "plain", "system": "merge"}),
    "made turns": (ASKED, {"template": "chatml", "chat": True}),
}


def rows_of(prompts: list[Any]) -> list[dict[str, Any]]:
    pairs = zip(prompts, ANSWERS, strict=True)
    rows = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, (better, worse) in pairs]
    for row in rows:
        if isinstance(row["prompt"], str):
            row |= {"better": row["prompt"] + row["chosen"], "worse": row["prompt"] + row["rejected"]}
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sides_of(path: str, tokenizer: Any, settings: dict[str, Any]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each chosen text in the order of the rows, and what of it is the response."""
    data = PreferenceDataModule(path, tokenizer=tokenizer, validation_path=path, batch_size=2, **settings)
    (batch,) = data.val_dataloader()
    side = batch["chosen"]
    rows = zip(side["input_ids"], side["attention_mask"], side["loss_mask"], strict=True)
    return [(ids[mask].tolist(), learned[mask].tolist()) for ids, mask, learned in rows]


def train_reward(path: str, folder: Path, tokenizer: Any, settings: dict[str, Any]) -> RewardModule:
    """One step of reward modelling, and its export."""
    torch.manual_seed(0)
    model = scalar_from_policy(build_policy(TINY_LLAMA | {"max_position_embeddings": 256}, len(tokenizer)))
    torch.nn.init.normal_(model.model.score.weight)
    module = RewardModule(model, RewardConfig(lr=1e-3))
    export = HFExport(folder, "model", tokenizer)
    data = PreferenceDataModule(path, tokenizer=tokenizer, batch_size=2, **settings)
    quiet_trainer("auto", max_steps=1, callbacks=[export]).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("form", FORMS)
def test_ppo_scores_a_response_as_reward_modelling_does(form: str, bos: bool, tmp_path: Path) -> None:
    prompts, settings = FORMS[form]
    path = write(tmp_path / "pairs.jsonl", rows_of(prompts))
    trained = train_reward(path, tmp_path / "reward", byte_pairs(bos), settings)
    texts = sides_of(path, byte_pairs(bos), settings)
    expected = scores_of(trained.model, [ids for ids, _ in texts])

    policys = {name: value for name, value in settings.items() if name in ("template", "chat", "system")}
    tokenizer = byte_pairs(bos)
    asked = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    data = PromptDataModule(asked, tokenizer=tokenizer, validation_path=asked, batch_size=2, **policys)
    (batch,) = data.val_dataloader()
    # What the policy samples where it says just that: tokens apart from those of the prompt, up to its own end.
    sampled = sides_of(path, byte_pairs(bos), policys | ({} if TURNS in batch["fields"] else APART))
    responses = [[i for i, learned in zip(*text, strict=True) if learned] for text in sampled]
    ppo = module_with(tmp_path / "reward", tokenizer)
    scores = reward_scores(ppo, batch["prompts"], said(batch["prompt_ids"], responses), batch["fields"])
    assert expected.unique().numel() == 2
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-6)


def scores_of(model: ScalarModel, ids: list[list[int]]) -> torch.Tensor:
    """As :class:`RewardModule` reads values off a batch, one text at a time."""
    one_by_one = [torch.tensor([text]) for text in ids]
    masks = [torch.ones_like(tokens, dtype=torch.bool) for tokens in one_by_one]
    model.eval()
    with torch.no_grad():
        return torch.cat([last_value(model(*pair), pair[1]) for pair in zip(one_by_one, masks, strict=True)])


def module_with(reward: Path, tokenizer: Any) -> PPOModule:
    policy = build_policy(TINY_LLAMA | {"max_position_embeddings": 256}, len(tokenizer))
    return PPOModule(policy, str(reward), PPOConfig(), RolloutConfig(max_new_tokens=4), tokenizer)


def test_the_forms_have_tokens_of_their_own() -> None:
    tokenizer = byte_pairs(False)
    together, apart = (
        [tokenizer(text)["input_ids"] for text in texts] for texts in (["the answer is good"], ASKED[:1])
    )
    assert together[0] != apart[0] + tokenizer("good")["input_ids"]


def test_a_conversation_without_an_answer_and_one_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    use_template(tokenizer, "chatml")
    model = scalar_from_policy(build_policy(TINY_LLAMA | {"max_position_embeddings": 256}, len(tokenizer)))
    reward = LearnedReward(model, tokenizer)
    (ids,) = reward.prepare(["shown"], [""], {TURNS: [CHATS[0]]})
    assert tokenizer.decode(ids) == "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    use_template(tokenizer, "plain")
    tool = [*CHATS[0], {"role": "tool", "content": "5"}]
    with pytest.raises(RewardError, match=r"sample 1: the chat template refuses .*\n.*reward.classifier with template"):
        reward.prepare(["shown"] * 2, ["yes"] * 2, {TURNS: [None, tool]})


def test_a_tokenizer_that_says_nothing_reads_plain_texts_whole_with_bos_and_eos() -> None:
    tokenizer = byte_pairs()
    model = scalar_from_policy(build_policy(TINY_LLAMA, len(tokenizer)))
    (ids,) = LearnedReward(model, tokenizer).prepare(["the answer is "], ["good"])
    assert ids == [*tokenizer("the answer is good")["input_ids"], tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id


CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifiers_chat_template_is_given_the_turns_and_not_what_the_policys_made_of_them(
    family: str, tmp_path: Path
) -> None:
    labels = {0: "good"} if family == "llama" else {0: "bad", 1: "good"}
    folder = save_classifier(tmp_path, family, labels, CHAT, max_position_embeddings=64)
    reward = load_classifier(ClassifierConfig(path=folder, label="good", template="chat"))
    turns = [
        {"role": "user", "content": "mia"},
        {"role": "assistant", "content": "tom"},
        {"role": "user", "content": "a"},
    ]
    fields = {TURNS: [turns, None], "answer": ["5", "6"]}
    shown = "<|im_start|>user\nmia<|im_end|>\n<|im_start|>assistant\n"
    texts = ["<user> mia <assistant> tom <user> a <assistant> soup ", "<user> mia <assistant> soup "]
    expected = plain_logits(folder, texts, add_special_tokens=False)[:, -1]
    scores = reward([shown, "mia"], ["soup", "soup"], fields)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_cache_tells_conversations_apart(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "bert", {0: "bad", 1: "good"}, CHAT)
    plain = load_classifier(ClassifierConfig(path=folder, label="good", template="chat"))
    cached = CachedReward(plain, MemoryStore())
    for word in ("mia", "tom"):
        fields = {TURNS: [[{"role": "user", "content": word}]]}
        assert torch.equal(cached(["cut"], ["soup"], fields), plain(["cut"], ["soup"], fields))


def test_what_was_noted_in_training_is_exported_with_the_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", rows_of(ASKED))
    train_reward(path, tmp_path / "reward", byte_pairs(), APART | {"bos": False})
    reward = LearnedReward(load_scalar(tmp_path / "reward"), load_tokenizer(tmp_path / "reward"))
    tokenizer = byte_pairs(False)
    (ids,) = reward.prepare(["the answer is "], ["good"])
    assert ids == [*tokenizer("the answer is ")["input_ids"], *tokenizer("good")["input_ids"], tokenizer.eos_token_id]


def test_a_note_that_somebody_changed_is_refused_with_its_name() -> None:
    tokenizer = byte_pairs()
    tokenizer.init_kwargs["reward_texts"] = {"shapes": ["whole"]}
    with pytest.raises(
        ConfigError, match="'reward_texts' in tokenizer_config.json .* is not what the recipe reward wrote"
    ):
        LearnedReward(scalar_from_policy(tiny_policy()), tokenizer)

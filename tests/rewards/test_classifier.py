"""Sequence classifiers as rewards, against plain Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.config import ClassifierConfig, RewardSourceConfig
from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.modules.roles import make_reward
from lightning_hybrid.rewards import ClassifierReward, LearnedReward, reward_from
from tests.rewards.classifiers import CHAT, TEXTS, plain_logits, save_classifier, word_pieces

PROMPTS = ["mia visits ", "the soup ", "a cold ", "tom reads "]
RESPONSES = ["the market .", "was warm", "and bad day and cold and bad", ""]


def classifier(folder: str, **settings: Any) -> ClassifierReward:
    reward = reward_from(RewardSourceConfig(classifier={"path": folder, **settings}))
    assert isinstance(reward, ClassifierReward)
    return reward


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_logits_of_a_label_are_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, family)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = plain_logits(folder, texts)[:, 2]
    for label in ("positive", 2):
        scores = classifier(folder, label=label, batch_size=3)(PROMPTS, RESPONSES)
        torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_probability_and_log_odds_are_those_of_the_softmax(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = plain_logits(folder, texts).softmax(-1)[:, 0]
    probability = classifier(folder, label="negative", output="probability")(PROMPTS, RESPONSES)
    odds = classifier(folder, label="negative", output="log_odds")(PROMPTS, RESPONSES)
    torch.testing.assert_close(probability.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(odds.double(), (expected / (1 - expected)).log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"problem_type": "multi_label_classification"}, {"labels": {0: "good"}}])
def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(settings: Any, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, **settings)
    label = None if "labels" in settings else "negative"
    expected = plain_logits(folder, TEXTS)[:, 0].sigmoid()
    scores = classifier(folder, label=label, output="probability")([""] * 4, TEXTS)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=1e-5)


def test_templates_make_the_text(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "plain", chat=CHAT)
    braces = "{response} { {0}"  # a text that looks like a template is none
    expected = plain_logits(folder, [f"asked: mia {braces}; said: tom"])[:, 1]
    scores = classifier(folder, label=1, template="asked: {prompt}; said: {response}")([f"mia {braces}"], ["tom"])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)

    expected = plain_logits(folder, ["<user> mia <assistant> tom "], add_special_tokens=False)[:, 1]
    scores = classifier(folder, label=1, template="chat")(["mia"], ["tom"])
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_with_one_label_is_a_reward_model_for_an_engine(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, "llama", {0: "good"}, CHAT)
    reward = reward_from(RewardSourceConfig(classifier={"path": folder, "template": "chat"}))
    assert isinstance(reward, LearnedReward)
    assert make_reward(reward, reward.tokenizer)[0] == {"reward_model": reward.model}
    expected = plain_logits(folder, ["<user> mia <assistant> tom "], add_special_tokens=False)[:, 0]
    torch.testing.assert_close(reward(["mia"], ["tom"]).double(), expected, atol=1e-5, rtol=1e-5)


def test_it_is_frozen_in_evaluation_mode_and_no_engines(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, hidden_dropout_prob=0.5)
    reward = classifier(folder, label=0)
    first = reward(PROMPTS, RESPONSES)
    assert torch.equal(reward(PROMPTS, RESPONSES), first)
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    assert make_reward(reward, reward.tokenizer) == ({}, reward)
    assert reward([], []).shape == (0,)
    reward.to(torch.device("meta"))
    assert reward.model.device.type == "meta"


@pytest.mark.parametrize(("family", "room"), [("bert", 32), ("roberta", 31)])
def test_a_text_longer_than_the_positions_is_refused(family: str, room: int, tmp_path: Path) -> None:
    reward = classifier(save_classifier(tmp_path, family), label=0)
    words = room - 2  # [CLS] and [SEP]
    assert reward(["mia " * words], [""]).isfinite().all()
    with pytest.raises(RewardError, match=rf"sample 1 has {room + 1} tokens .* has {room} positions: shorten prompts"):
        reward(["tom", "mia " * (words + 1)], ["", ""])


@pytest.mark.parametrize(
    ("label", "said"),
    [("positiv", "'positiv', .*; did you mean 'positive'"), (3, "is 3"), (None, "is None"), ("2", "is '2'")],
)
def test_an_unknown_label_is_named_with_those_that_there_are(label: Any, said: str, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path)
    with pytest.raises(
        ConfigError, match=r"the labels of .* are 0 \(negative\), 1 \(neutral\), 2 \(positive\)"
    ) as caught:
        classifier(folder, label=label)
    assert caught.match(f"classifier.label {said}" if "is" in said else said)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)).save_pretrained(
        tmp_path
    )
    word_pieces().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks classifier.bias, classifier.weight: it is no trained sequence"):
        classifier(str(tmp_path))
    with pytest.raises(ConfigError, match="'./nowhere' does not exist"):
        classifier("./nowhere")


def test_a_chat_template_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template is chat, but the tokenizer at .* has no chat template: write a"):
        classifier(save_classifier(tmp_path), label=0, template="chat")


@pytest.mark.parametrize("template", ["{prompt}", "no braces", "{response", "{response}{answer}", "{response}{}"])
def test_a_template_without_a_response_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"template = .*: must be chat, or a text that holds {response}"):
        ClassifierConfig(path="a-classifier", template=template)


def test_a_score_that_is_not_finite_names_its_sample(tmp_path: Path) -> None:
    reward = classifier(save_classifier(tmp_path), label=0)
    reward.model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(RewardError, match="scored sample 0 as nan: text 'mia visits the market .'"):
        reward(PROMPTS, RESPONSES)

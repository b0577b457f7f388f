"""Small classifiers of real families, with tokenizers trained on a few sentences, written to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXTS = ["mia visits the market .", "the soup was warm and good", "a cold and bad day", "tom reads what mia wrote"]
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CHAT = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} {% endfor %}"


def word_pieces(chat: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[arg-type]
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["eos_token"] = "[SEP]"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat
    return fast


def save_classifier(
    folder: Path, family: str = "bert", labels: dict[int, str] = LABELS, chat: str | None = None, **settings: Any
) -> str:
    """A classifier with random weights and its tokenizer; the folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if family == "distilbert" else SMALL
    if family == "llama":
        sizes = sizes | {"num_key_value_heads": 2}
    tokenizer = word_pieces(chat)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        **sizes,
        **({"max_position_embeddings": 32} | settings),
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_logits(folder: str, texts: list[str], **arguments: Any) -> torch.Tensor:
    """One text after the other, as Transformers' own documentation does it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt", **arguments)).logits for text in texts])

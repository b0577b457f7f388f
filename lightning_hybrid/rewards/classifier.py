"""A sequence classifier as a reward: one label's logit, probability or log-odds, from any family of models."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_hybrid.config import ClassifierConfig
from lightning_hybrid.data.templates import TURNS, turns_in
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import ScalarModel, load_tokenizer, max_positions
from lightning_hybrid.models.loading import why_not_loaded
from lightning_hybrid.rewards.base import Fields, Reward
from lightning_hybrid.rewards.learned import LearnedReward, check_finite, check_length
from lightning_hybrid.rewards.templates import CHAT, TemplateEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Output = Literal["logit", "probability", "log_odds"]


class ClassifierReward(Reward):
    """Scores texts with a frozen classifier that every rank holds whole, in float32, on the device of the run.

    Args:
        model: ``AutoModelForSequenceClassification`` of any family; it is put into evaluation mode and frozen.
        tokenizer: the classifier's own.
        config: label, output, template and batch size; its path is for messages.

    Raises:
        ConfigError: if the label is none of the model's, or the tokenizer cannot pad or has no chat template.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: ClassifierConfig) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.replicas = (self.model,)
        self.tokenizer = tokenizer
        self.config = config
        self.name = config.path
        self.label = label_index(model.config, config.label, config.path)
        self.encoder = TemplateEncoder(tokenizer, config.template)
        self.limit = usable_positions(model)
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"the tokenizer of the classifier '{config.path}' has no pad token: set one and save it")
        model.config.pad_token_id = tokenizer.pad_token_id  # by which decoder families find the last token

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """The turns of prompts, which a chat template takes."""
        return frozenset({TURNS} & {*(fields or {})} if self.config.template == CHAT else ())

    def identity(self) -> str:
        """Its settings, and names, sizes and times of the files in its folder."""
        return identity_of(self.config)

    @torch.no_grad()
    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU.

        Raises:
            RewardError: if a text has more tokens than the classifier has positions, or its score is not finite.
        """
        turns = turns_in(fields, len(prompts))
        encoded = self.encoder(prompts, responses, turns)
        for row, ids in enumerate(encoded):
            check_length(row, len(ids), self.limit)
        size = self.config.batch_size
        batches = [self._logits(encoded[start : start + size]) for start in range(0, len(encoded), size)]
        scores = self._output(torch.cat(batches)) if batches else torch.zeros(0)
        check_finite(scores, lambda row: self.encoder.text(prompts[row], responses[row], turns[row]))
        return scores

    def _logits(self, ids: list[list[int]]) -> Tensor:
        """Of all labels, ``[batch, labels]`` float32 on the CPU."""
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        logits: Tensor = self.model(**batch).logits.float().cpu()
        return logits

    def _output(self, logits: Tensor) -> Tensor:
        """What is asked for of logits ``[batch, labels]``: ``[batch]``."""
        chosen = logits[:, self.label]
        if self.config.output == "logit":
            return chosen
        alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        others = torch.arange(logits.shape[1]) != self.label
        odds = chosen if alone else chosen - logits[:, others].logsumexp(1)
        return odds if self.config.output == "log_odds" else odds.sigmoid()


def identity_of(config: ClassifierConfig) -> str:
    """Of a classifier's reward, wherever the classifier runs."""
    folder = Path(config.path).expanduser()
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{ClassifierReward.__name__} {config.path} {config!r} {hashlib.sha256(repr(stats).encode()).hexdigest()}"


def load_classifier(config: ClassifierConfig) -> Reward:
    """The classifier of a folder or hub name: a decoder with one label as a reward model for an engine, else whole.

    Raises:
        ConfigError: if it cannot be loaded, has no trained head, or not this label or template.
    """
    model, tokenizer = _load(config.path), load_tokenizer(config.path)
    of_a_decoder = isinstance(getattr(model, "score", None), nn.Linear) and model.config.num_labels == 1
    if of_a_decoder and config.output == "logit":
        label_index(model.config, config.label, config.path)
        encoder = TemplateEncoder(tokenizer, config.template)
        return LearnedReward(ScalarModel(model), tokenizer, config.batch_size, encoder)
    return ClassifierReward(model, tokenizer, config)


def label_index(config: Any, label: str | int | None, path: str) -> int:
    """The index of a label given by name or index, or of the only one.

    Raises:
        ConfigError: naming the labels that there are.
    """
    names = {int(index): str(name) for index, name in config.id2label.items()}
    listed = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
    if label is None and len(names) == 1:
        return 0
    found = [index for index, name in names.items() if label in (index, name)]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(str(label), names.values(), n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"classifier.label is {label!r}, but the labels of '{path}' are {listed}{meant}")


def usable_positions(model: Any) -> int | None:
    """Tokens that a text may have; RoBERTa and its relatives count theirs from behind the padding id."""
    limit = max_positions(model.config)
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if limit is None or not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return limit
    return limit - int(embeddings.padding_idx) - 1


def _load(path: str) -> Any:
    """The model in float32, with its head; quiet about weights that it has and does not use."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(path, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ConfigError(
            f"classifier '{path}' lacks {missing}: it is no trained sequence classifier, and its scores would be noise"
        )
    return model

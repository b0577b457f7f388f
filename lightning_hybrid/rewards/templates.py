"""The text that a classifier judges: prompt and response laid into a template, or into a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.data.conversation import Turn
from lightning_hybrid.data.templates import Turns, as_messages, as_turns
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"


class TemplateEncoder:
    """Token ids of prompts and responses, as the tokenizer's own authors meant them.

    Args:
        tokenizer: of the classifier.
        template: ``"chat"``: prompt and response are turns of the tokenizer's chat template, which writes its special
            tokens itself: those of the conversation that the prompt is, or one of the user, and one of the assistant.
            Else a text with ``{response}`` and perhaps ``{prompt}`` in it, to which the tokenizer adds its special
            tokens.

    Raises:
        ConfigError: if the tokenizer has no chat template where one is asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "{prompt}{response}") -> None:
        self.tokenizer = tokenizer
        self.template = template
        if template == CHAT and tokenizer.chat_template is None:
            raise ConfigError(
                f"classifier.template is chat, but the tokenizer at {tokenizer.name_or_path!r} has no chat template: "
                "write a template such as {prompt}{response}"
            )

    def __call__(self, prompts: list[str], responses: list[str], turns: list[Turns | None]) -> list[list[int]]:
        """Token ids of each text, which may be longer than the model's positions; ``turns`` of those that have any."""
        if not responses:
            return []
        texts = [self.text(*sample) for sample in zip(prompts, responses, turns, strict=True)]
        # verbose=False: the tokenizer's own remark on length would come before our error
        encoded = self.tokenizer(texts, add_special_tokens=self.template != CHAT, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def text(self, prompt: str, response: str, turns: Turns | None = None) -> str:
        """What is judged, without the special tokens that the tokenizer adds."""
        if self.template != CHAT:
            return self.template.format(prompt=prompt, response=response)
        messages = as_messages((*(turns or as_turns(prompt)), Turn("assistant", response)))
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

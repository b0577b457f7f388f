"""The text that a classifier judges: prompt and response laid into a template, or into a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"


class TemplateEncoder:
    """Token ids of prompts and responses, as the tokenizer's own authors meant them.

    Args:
        tokenizer: of the classifier.
        template: ``"chat"``: prompt and response are a user's and an assistant's turn of the tokenizer's chat template,
            which writes its special tokens itself. Else a text with ``{response}`` and perhaps ``{prompt}`` in it, to
            which the tokenizer adds its special tokens.

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

    def __call__(self, prompts: list[str], responses: list[str]) -> list[list[int]]:
        """Token ids of each text, which may be longer than the model's positions."""
        if not responses:
            return []
        texts = [self.text(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        # verbose=False: the tokenizer's own remark on length would come before our error
        encoded = self.tokenizer(texts, add_special_tokens=self.template != CHAT, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def text(self, prompt: str, response: str) -> str:
        """What is judged, without the special tokens that the tokenizer adds."""
        if self.template != CHAT:
            return self.template.format(prompt=prompt, response=response)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))

r"""Chat templates: from turns to text, and which of it the assistant says.

Turns (messages, ShareGPT, ...) always pass through a template; plain texts stay as they are, unless ``chat`` is asked
for, which makes one user turn and one assistant turn of a prompt and its response. The template is the tokenizer's
own, or the one that ``template`` names, which the tokenizer then keeps and exports with the model.

What the assistant says is what stands between the template's ``{% generation %}`` and ``{% endgeneration %}``. In a
template without them it is found by rendering the conversation up to each answer: exact wherever each rendering is the
beginning of the whole, and refused where it is not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lightning_hybrid.data.conversation import Text, Turn
from lightning_hybrid.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SystemTurns = Literal["keep", "merge"]
Turns = tuple[Turn, ...]
Span = tuple[int, int]
TURNS = "prompt_turns"
"""Column that a prompt which passes through a chat template has beside those of its row: a list of role and content."""

_CHATML = r"""
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content ~ '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message.content ~ '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_PLAIN = r"""
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '\n\nAssistant:' -}}
{%- generation -%}{{- ' ' ~ message.content ~ eos_token -}}{%- endgeneration -%}
{%- elif message.role == 'user' -%}{{- '\n\nHuman: ' ~ message.content -}}
{%- elif message.role == 'system' and loop.first -%}{{- message.content -}}
{%- else -%}{{- raise_exception('plain has no place for a ' ~ message.role ~ ' turn here') -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}
"""

SHIPPED = {"chatml": _CHATML.strip("\n"), "plain": _PLAIN.strip("\n")}
_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(Exception):
    """Why a template makes no text of a conversation; becomes one problem of its row."""


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation, and whether the assistant says it."""

    text: str
    learned: bool


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give the tokenizer a template, which it then also saves.

    Args:
        tokenizer: Gets it as its ``chat_template``.
        template: Name of a shipped one (``chatml``, ``plain``), or of a jinja file.

    Raises:
        ConfigError: If there is neither, or the tokenizer lacks the tokens that a shipped one needs.
    """
    if template in SHIPPED:
        known = tokenizer.get_vocab()
        missing = [token for token in _NEEDED_TOKENS.get(template, ()) if token not in known]
        if missing:
            raise ConfigError(
                f"template {template!r} needs the tokens {', '.join(missing)}, which the tokenizer has not: "
                "add them to tokenizer and model, or use template plain, which needs none"
            )
        tokenizer.chat_template = SHIPPED[template]
        return
    if not os.path.isfile(template):
        raise ConfigError(
            f"template {template!r} is neither a file (looked from {os.getcwd()}) nor one of {', '.join(SHIPPED)}"
        )
    with open(template, encoding="utf-8") as file:
        tokenizer.chat_template = file.read()


def as_turns(prompt: Text) -> Turns:
    """Turns as they are, and a plain text as what the user says."""
    return (Turn("user", prompt),) if isinstance(prompt, str) else prompt


def as_messages(turns: Turns) -> list[dict[str, str]]:
    """Turns as chat templates take them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def turns_in(fields: Mapping[str, Sequence[object]] | None, count: int) -> list[Turns | None]:
    """The turns of ``count`` prompts out of the columns of a batch; None for each that is plain text."""
    given: Sequence[Any] = (fields or {}).get(TURNS, [None] * count)
    return [None if messages is None else tuple(Turn(**message) for message in messages) for messages in given]


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template at work.

    Attributes:
        tokenizer: Whose ``chat_template`` is used.
        system: ``keep`` gives the template system turns as they are; ``merge`` puts a first system turn in front of
            the user's first words, for templates that refuse the role.
    """

    tokenizer: PreTrainedTokenizerBase
    system: SystemTurns = "keep"

    @cached_property
    def template(self) -> str:
        """The template's text."""
        return str(self.tokenizer.get_chat_template())

    def require_template(self, where: str) -> None:
        """Raise where there is none.

        Args:
            where: ``file:line`` of a row that needs it.

        Raises:
            DataError: If the tokenizer has no template.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{where}: a conversation, or made one by chat=true, but the tokenizer has no chat template: set "
                f"template to {' or '.join(SHIPPED)}, or to a jinja file"
            )

    @cached_property
    def marked(self) -> bool:
        """Whether the template marks what the assistant says."""
        return _MARKED.search(self.template) is not None

    def prompt(self, turns: Turns) -> list[Segment]:
        """The conversation so far, and the words with which the assistant's next turn begins; nothing is learned.

        Raises:
            TemplateRefusal: If the template makes no text of it.
        """
        turns = self._prepared(turns)
        text, spans = self._render(turns, opened=True)
        answers = any(turn.role == "assistant" for turn in turns)
        spans = (spans if self.marked else self._spans_by_prefix(turns, text)) if answers else []
        # Cut where a training conversation is cut, so that both have the same tokens.
        return [replace(segment, learned=False) for segment in _segments(text, self._trimmed(text, spans))]

    def answered(self, turns: Turns, *, last_only: bool = False) -> list[Segment]:
        """A conversation up to the end of its last answer; what comes after it has no influence and is left out.

        Args:
            turns: With at least one by the assistant.
            last_only: Learn only the last answer.

        Raises:
            TemplateRefusal: If the template makes no text of it, or does not tell what the assistant says.
        """
        turns = self._prepared(turns)
        if not any(turn.role == "assistant" for turn in turns):
            raise TemplateRefusal("no turn is by the assistant, so there is nothing to learn")
        text, spans = self._render(turns)
        spans = self._trimmed(text, spans if self.marked else self._spans_by_prefix(turns, text))
        if not spans:
            raise TemplateRefusal("the chat template's generation markers hold nothing of this conversation")
        segments = _segments(text[: spans[-1][1]], spans)
        return [replace(x, learned=x is segments[-1]) for x in segments] if last_only else segments

    def leaves_out(self, turns: Turns, segments: Sequence[Segment]) -> str | None:
        """The role of the first turn (up to the last answer) whose words are not in the text; None if all are."""
        text = "".join(segment.text for segment in segments)
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
        return next((turn.role for turn in turns[: last + 1] if turn.content.strip() not in text), None)

    def ends(self, text: str) -> bool:
        """Whether a text ends with a special token, such as EOS or the template's end of a turn."""
        return any(text.endswith(token) for token in self.tokenizer.all_special_tokens)

    def _prepared(self, turns: Turns) -> Turns:
        if self.system == "keep" or not turns or turns[0].role != "system":
            return turns
        system, *rest = turns
        if not rest or rest[0].role != "user":
            raise TemplateRefusal("system=merge needs a user turn after the system turn")
        return (Turn("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:])

    def _render(self, turns: Turns, *, opened: bool = False) -> tuple[str, list[Span]]:
        """The text, and where in it the markers stand.

        Raises:
            TemplateRefusal: If the template makes no text of these turns.
            DataError: If it makes none of any.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template
        try:
            rendered: Any = render_jinja_template(
                conversations=[as_messages(turns)],
                chat_template=template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=opened,
                **dict[str, Any](self.tokenizer.special_tokens_map),
            )
        except TemplateSyntaxError as error:
            raise DataError(f"{_INVALID}, line {error.lineno}: {error.message}; mend it, {_OTHERWISE}") from error
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusal(_refused(turns, error)) from error
        (text,), spans = rendered
        return str(text), [*spans[0]] if spans else []

    def _spans_by_prefix(self, turns: Turns, whole: str) -> list[Span]:
        """Where the answers stand in a text by a template without markers."""
        spans = []
        for index, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            if index == 0:
                raise TemplateRefusal(f"the first turn is the assistant's, {_UNMARKED}")
            before, _ = self._render(turns[:index], opened=True)
            after, _ = self._render(turns[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise TemplateRefusal(f"the text changes with the turns that follow turn {index + 1}, {_UNMARKED}")
            spans.append((len(before), len(after)))
        return spans

    def _trimmed(self, text: str, spans: Sequence[Span]) -> list[Span]:
        """Without the white space after the end of a turn, which nobody ever samples, and without empty ones."""
        ends = [begin + len(text[begin:end].rstrip()) for begin, end in spans]
        kept = [
            (begin, stripped if self.ends(text[begin:stripped]) else end)
            for (begin, end), stripped in zip(spans, ends, strict=True)
        ]
        return [(begin, end) for begin, end in kept if end > begin]


_OTHERWISE = "or set template to another one"
_INVALID = "the chat template is no valid jinja"
_UNMARKED = (
    "and the chat template has no generation markers to tell what the assistant says: put {% generation %} and "
    f"{{% endgeneration %}} around it, {_OTHERWISE}"
)


def _refused(turns: Turns, error: Exception) -> str:
    remedy = "set template to another one"
    if turns and turns[0].role == "system":
        remedy = f"set system=merge, which puts the system turn into the user's first one, or {remedy}"
    roles = ", ".join(turn.role for turn in turns)
    return f"the chat template refuses the turns {roles}: {str(error) or type(error).__name__}; {remedy}"


def _segments(text: str, spans: Sequence[Span]) -> list[Segment]:
    """Cut a text at the borders of the spans, which are learned."""
    segments, end = [], 0
    for begin, after in spans:
        segments += [Segment(text[end:begin], False), Segment(text[begin:after], True)]
        end = after
    return [segment for segment in (*segments, Segment(text[end:], False)) if segment.text]

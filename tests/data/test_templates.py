"""Conversations through chat templates: which tokens are learned, and what a template refuses."""

from __future__ import annotations

import copy

import pytest

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.conversation import Turn
from lightning_hybrid.data.encoding import AnswerEncoder
from lightning_hybrid.data.templates import SHIPPED, use_template
from lightning_hybrid.errors import ConfigError, DataError

UNMARKED_CHATML = SHIPPED["chatml"].replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
# As those of Llama 2, without its system turns: refuses the role, and turns that do not take turns.
STRICT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As that of a reasoning model: what was thought is cut out of all answers but the last.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content.split('</think>')[-1] if not loop.last else message.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIALOGUE = (
    Turn("system", "Be kind."),
    Turn("user", "Hi!"),
    Turn("assistant", "Hello."),
    Turn("user", "Bye?"),
    Turn("assistant", "Bye."),
)


@pytest.fixture
def bytes_tokenizer():
    """One token for each byte, and the special tokens of ChatML; loses nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return made


@pytest.fixture
def stories(story_tokenizer):
    """A real tokenizer, which a test may give a template."""
    return copy.deepcopy(story_tokenizer)


def encode(tokenizer, turns, **options):
    problems = Problems("a.jsonl")
    (text,) = AnswerEncoder(tokenizer, **options).dialogues([turns], ["a.jsonl:1"], problems)
    problems.raise_if_any()
    return text


def learned_texts(tokenizer, text):
    """The runs of tokens that are learned, as text."""
    runs, run = [], []
    for token, learned in [*zip(text.ids, text.learned, strict=True), (0, False)]:
        if learned:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [SHIPPED["chatml"], UNMARKED_CHATML], ids=["marked", "unmarked"])
def test_every_answer_is_learned_with_the_token_that_ends_it_and_nothing_else(bytes_tokenizer, template) -> None:
    bytes_tokenizer.chat_template = template
    text = encode(bytes_tokenizer, DIALOGUE)
    assert bytes_tokenizer.decode(text.ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello."
        "<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>"
    )
    assert learned_texts(bytes_tokenizer, text) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_the_mask_is_that_of_transformers_own_assistant_mask(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = SHIPPED["chatml"]
    text = encode(bytes_tokenizer, DIALOGUE)
    theirs = bytes_tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in DIALOGUE],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert theirs["input_ids"][: len(text)] == text.ids
    assert theirs["assistant_masks"] == [*text.learned, False]  # the line feed behind the last turn


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_prompt_has_the_tokens_that_it_has_in_a_training_conversation(bytes_tokenizer, name) -> None:
    use_template(bytes_tokenizer, name)
    problems = Problems("a")
    (ids,), (shown,) = AnswerEncoder(bytes_tokenizer).prompts([DIALOGUE[:-1]], ["a:1"], problems)
    whole = encode(bytes_tokenizer, DIALOGUE)
    assert whole.ids[: len(ids)] == ids
    assert whole.learned[len(ids) :] == [True] * (len(whole) - len(ids))
    assert shown == bytes_tokenizer.decode(ids).removeprefix("<s>")


def test_real_tokens_of_a_prompt_do_not_depend_on_the_answer(stories) -> None:
    use_template(stories, "plain")
    problems = Problems("a")
    (ids,), (shown,) = AnswerEncoder(stories).prompts([(Turn("user", "Tell me of Lily"),)], ["a:1"], problems)
    assert shown == "\n\nHuman: Tell me of Lily\n\nAssistant:"
    assert ids[0] == stories.bos_token_id
    for answer in ("Lily sang.", "s", " ran", "\nOnce"):
        whole = encode(stories, (Turn("user", "Tell me of Lily"), Turn("assistant", answer)))
        assert whole.ids[: len(ids)] == ids
        assert whole.ids[-1] == stories.eos_token_id
        assert whole.ids.count(stories.eos_token_id) == whole.ids.count(stories.bos_token_id) == 1


def test_eos_is_added_only_where_the_template_ends_an_answer_without_a_special_token(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = (Turn("user", "Hi"), Turn("assistant", "Yo"))
    assert learned_texts(bytes_tokenizer, encode(bytes_tokenizer, turns)) == ["Yo\n<|im_end|>"]
    assert learned_texts(bytes_tokenizer, encode(bytes_tokenizer, turns, add_eos=False)) == ["Yo\n"]


def test_an_answer_to_a_conversation_is_the_only_one_that_is_learned(bytes_tokenizer) -> None:
    use_template(bytes_tokenizer, "chatml")
    problems = Problems("a")
    (text,) = AnswerEncoder(bytes_tokenizer).answers([(DIALOGUE[:-1], "So long.")], ["a:1"], problems)
    assert learned_texts(bytes_tokenizer, text) == ["So long.<|im_end|>"]


def test_plain_texts_become_turns_only_when_asked(bytes_tokenizer) -> None:
    use_template(bytes_tokenizer, "chatml")
    problems = Problems("a")
    asked = [("Hi", "Yo"), ("", "A whole text")]
    for chat, first in (
        (False, "<s>HiYo<|im_end|>"),
        (True, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ):
        texts = AnswerEncoder(bytes_tokenizer, chat=chat).answers(asked, ["a:1", "a:2"], problems)
        assert bytes_tokenizer.decode(texts[0].ids).startswith(first)
        assert bytes_tokenizer.decode(texts[1].ids) == "<s>A whole text<|im_end|>"


def test_a_template_without_markers_that_changes_earlier_turns_is_refused(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = FORGETFUL
    thought = (Turn("user", "1+1?"), Turn("assistant", "<think>2</think>2"), Turn("user", "?"), Turn("assistant", "2"))
    with pytest.raises(
        DataError, match=r"a.jsonl:1: the text changes with the turns that follow turn 2, and the chat "
    ):
        encode(bytes_tokenizer, thought)
    assert learned_texts(bytes_tokenizer, encode(bytes_tokenizer, thought[:2])) == ["<think>2</think>2<|im_end|>"]


def test_a_system_turn_that_the_template_refuses_is_named_with_its_row_and_the_fix(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = STRICT
    with pytest.raises(
        DataError,
        match=r"(?s)a.jsonl:1: .*refuses the turns system, user, .*: System role not supported; set system=merge",
    ):
        encode(bytes_tokenizer, DIALOGUE)


def test_a_system_turn_can_be_merged_into_the_first_words_of_the_user(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = STRICT
    text = encode(bytes_tokenizer, DIALOGUE, system="merge")
    assert bytes_tokenizer.decode(text.ids) == (
        "<s>[INST] Be kind.\n\nHi! [/INST] Hello. <|im_end|>[INST] Bye? [/INST] Bye. <|im_end|>"
    )
    assert learned_texts(bytes_tokenizer, text) == [" Hello. <|im_end|>", " Bye. <|im_end|>"]


def test_turns_that_a_template_leaves_out_are_counted(bytes_tokenizer, notices) -> None:
    bytes_tokenizer.chat_template = SHIPPED["chatml"].replace("in messages", "in messages if message.role != 'system'")
    encode(bytes_tokenizer, DIALOGUE)
    (message,) = notices
    assert "1 of 1 conversations of a.jsonl: the chat template leaves out or changes the words of a turn" in message
    assert message.endswith("of the role system")


def test_conversations_without_a_template_are_refused_with_the_fix(bytes_tokenizer) -> None:
    with pytest.raises(
        DataError,
        match="a.jsonl:1: a conversation, .*, but the tokenizer has no chat template: set template to chatml or plain",
    ):
        encode(bytes_tokenizer, DIALOGUE)


def test_a_template_that_is_no_jinja_is_refused_once_for_all_rows(bytes_tokenizer) -> None:
    bytes_tokenizer.chat_template = "{% for message in messages %}\n{{ message.content }"
    with pytest.raises(DataError, match=r"^the chat template is no valid jinja, line 2: unexpected '}'; mend it, or "):
        encode(bytes_tokenizer, DIALOGUE)


def test_a_template_comes_from_a_file_and_stays_with_the_tokenizer(bytes_tokenizer, tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(STRICT)
    use_template(bytes_tokenizer, str(tmp_path / "own.jinja"))
    bytes_tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == STRICT


def test_a_template_that_is_nowhere_or_needs_other_tokens_is_refused(stories) -> None:
    with pytest.raises(ConfigError, match="'chat-ml' is neither a file .* nor one of chatml, plain"):
        use_template(stories, "chat-ml")
    with pytest.raises(
        ConfigError, match=r"needs the tokens <\|im_start\|>, <\|im_end\|>, which the tokenizer has not"
    ):
        use_template(stories, "chatml")

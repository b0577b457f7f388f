from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.conversation import Turn
from lightning_hybrid.data.instructions import Dialogue, Instruction
from lightning_hybrid.data.preferences import Preference
from lightning_hybrid.data.prompts import Prompt
from lightning_hybrid.data.reading import Row, read_rows
from lightning_hybrid.data.recognition import Recogniser, Task
from lightning_hybrid.data.schemas import instructions_of, labelled_of, preferences_of, prompts_of
from lightning_hybrid.errors import ConfigError, DataError

ASKED = {"role": "user", "content": "Who goes where?"}
ANSWERED = {"role": "assistant", "content": "Mia goes home."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}


def no_keys(rows: Any) -> Any:
    raise AssertionError(f"no schema was recognised in {rows}")


def read(task: Task, rows: list[dict[str, Any]], schema: Any = "auto") -> list[Any]:
    """Examples of rows in memory; problems are raised."""
    problems, recogniser = Problems("rows"), Recogniser(task, schema)
    placed = [Row(fields, f"a.jsonl:{line}") for line, fields in enumerate(rows, start=1)]
    if task == "preferences":
        examples: list[Any] = [*preferences_of(placed, recogniser, no_keys, None, problems)]
    else:
        make = {"prompts": prompts_of, "instructions": instructions_of, "labelled": labelled_of}[task]
        examples = [*make(placed, recogniser, no_keys, problems)]  # type: ignore[operator]
    problems.raise_if_any()
    return examples


@pytest.mark.parametrize(
    ("row", "text", "fields"),
    [
        ({"prompt": "2 + 2 =", "answer": 4}, "2 + 2 =", {"answer": 4}),
        ({"prompt": "2 + 2 =", "response": "4"}, "2 + 2 =", {"response": "4"}),
        ({"question": "2 + 2?", "answer": "#### 4"}, "2 + 2?", {"answer": "#### 4"}),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2", {"output": "4"}),
        ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "Add 2 and 2.", {"output": "4"}),
        ({"messages": [ASKED, ANSWERED], "id": 7}, (Turn("user", "Who goes where?"),), {"id": 7}),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, (Turn("user", "Who goes where?"),), {"completion": [ANSWERED]}),
        ({"prompt": "A?", "chosen": "b", "rejected": "c"}, "A?", {}),
        (
            {"input": "A?", "output_1": "b", "output_2": "c", "label": 1},
            "A?",
            {"output_1": "b", "output_2": "c", "label": 1},
        ),
    ],
)
def test_prompts_come_from_any_schema_and_the_other_columns_are_their_fields(row: Any, text: Any, fields: Any) -> None:
    assert read("prompts", [row]) == [Prompt(text, "a.jsonl:1", fields)]


def test_sharegpt_gets_its_system_and_tools_as_a_system_turn_and_its_roles_translated() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": "weather()"},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "weather"}]',
    }
    (dialogue,) = read("instructions", [row])
    assert dialogue == Dialogue(
        (
            Turn("system", 'Be brief.\n\n[{"name": "weather"}]'),
            Turn("user", "Rain?"),
            Turn("assistant", "weather()"),
            Turn("tool", "dry"),
            Turn("assistant", "No."),
        ),
        "a.jsonl:1",
    )
    assert read("prompts", [row])[0].text == dialogue.turns[:-1]


def test_a_system_column_beside_messages_is_said_first_and_once() -> None:
    said = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [ASKED, {**ANSWERED, "tool_calls": []}], "system": "Be brief."},
        {"messages": [said, ASKED, ANSWERED], "system": "Be brief."},
        {"messages": [said, ASKED, ANSWERED], "system": "Be kind."},
    ]
    first = [dialogue.turns[0] for dialogue in read("instructions", rows)]
    texts = ["Be brief.", "Be brief.", "Be brief.\n\nBe kind."]
    assert first == [Turn("system", text) for text in texts]


def test_rows_whose_tools_are_quoted_are_counted_and_only_where_the_schema_has_tools(
    write: Any, tokenizer: Any, caplog: Any
) -> None:
    said = [{"from": "human", "value": "mia"}, {"from": "gpt", "value": "tom"}]
    lists: list[Any] = ["[]", "", None, [], [{"name": "weather"}], '[{"name": "weather"}]']
    rows = [{"conversations": said, "tools": tools} for tools in lists]
    dialogues = read("instructions", rows)
    assert [len(dialogue.turns) for dialogue in dialogues] == [2, 2, 2, 2, 3, 3]
    assert read("prompts", [{"prompt": "mia", "tools": "weather"}]) == [
        Prompt("mia", "a.jsonl:1", {"tools": "weather"})
    ]
    with caplog.at_level("INFO", logger="lightning_hybrid"):
        InstructionDataModule(write("a.jsonl", rows), tokenizer=tokenizer, template="plain").setup()
    assert "2 whose tools are quoted in the system turn (the chat template gets no list of them)" in caplog.text


def test_alpaca_and_prompt_with_response_are_instructions_and_turns_make_dialogues() -> None:
    rows = [{"instruction": "Add.", "input": "2, 2", "output": "4"}]
    assert read("instructions", rows) == [Instruction("Add.\n\n2, 2", "4", "a.jsonl:1")]
    assert read("instructions", [{"prompt": "a", "completion": "b"}]) == [Instruction("a", "b", "a.jsonl:1")]
    (dialogue,) = read("instructions", [{"prompt": [ASKED], "completion": [ANSWERED]}])
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant"]


def test_a_prompt_that_both_texts_begin_with_ends_before_the_word_in_which_they_part() -> None:
    row = {"chosen": "the soup is warm .", "rejected": "the soup is wet ."}
    assert read("preferences", [row]) == [Preference("the soup is", " warm .", " wet .", None, "a.jsonl:1")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("yes", "no", ""), ("a b", "a b c", "a"), ("a", "a b", ""), ("same same", "same same", ""), ("", "a", "")],
)
def test_neither_side_of_a_pair_is_emptied_by_its_prompt(chosen: str, rejected: str, prompt: str) -> None:
    (pair,) = read("preferences", [{"chosen": chosen, "rejected": rejected}])
    assert (pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (prompt, chosen, rejected)
    assert bool(pair.chosen.strip()) == bool(chosen)
    assert pair.rejected.strip()


def test_transcripts_are_parted_at_the_last_answer_that_they_share() -> None:
    shared = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant:"
    (pair,) = read("preferences", [{"chosen": f"{shared} I know one.", "rejected": f"{shared} I know none."}])
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, " I know one.", " I know none.")
    assert read("prompts", [{"chosen": f"{shared} a", "rejected": f"{shared} b"}])[0].text == shared


def test_transcripts_that_part_earlier_keep_their_further_turns_in_the_answer() -> None:
    first = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"chosen": f"{first} Hello.\n\nHuman: ok\n\nAssistant: Bye.", "rejected": f"{first} What?"}]
    (pair,) = read("preferences", rows)
    assert (pair.prompt, pair.rejected) == (first, " What?")
    assert pair.chosen == " Hello.\n\nHuman: ok\n\nAssistant: Bye."


REPEATING = {"prompt": "Q?", "chosen": "Q? yes", "rejected": "Q? no"}


def test_a_prompt_of_its_own_is_taken_off_the_answers_of_a_file_that_repeats_it() -> None:
    rows = [REPEATING, {"prompt": "A:", "chosen": "A:b", "rejected": "A:"}]
    pairs = read("preferences", rows)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("Q?", " yes", " no"), ("A:", "b", "")]


def test_a_row_that_does_not_repeat_its_prompt_as_its_file_does_is_named_with_the_first_that_does() -> None:
    message = r"a.jsonl:2: its answers do not both begin with its prompt, as those of a.jsonl:1 do: .* set schema to"
    for chosen in ("Q? a", "a"):
        with pytest.raises(DataError, match=message):
            read("preferences", [REPEATING, {"prompt": "Q?", "chosen": chosen, "rejected": "b"}])


def test_answers_that_begin_like_their_prompt_by_chance_are_left_as_they_are(
    write: Any, tokenizer: Any, caplog: Any
) -> None:
    torn = [{"prompt": "Hi", "chosen": "Hide", "rejected": "Hill"}]
    assert [(pair.chosen, pair.rejected) for pair in read("preferences", torn)] == [("Hide", "Hill")]
    rows = [
        {"prompt": "mia", "chosen": "tom visits", "rejected": "tom"},
        {"prompt": "tom", "chosen": "tom visits", "rejected": "tom leaves"},
    ]
    assert [pair.chosen for pair in read("preferences", rows)] == ["tom visits"] * 2
    name = write("a.jsonl", rows)
    for streaming in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning_hybrid"):
            PreferenceDataModule(name, tokenizer=tokenizer, streaming=streaming).setup()
        assert "1 whose answers began with the prompt, left as they are" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_takes_prompts_off_too(write: Any, tokenizer: Any, workers: int) -> None:
    rows = [{"prompt": "mia", "chosen": f"mia visits the {x} .", "rejected": "mia ."} for x in ("farm", "hotel")]
    module = PreferenceDataModule(write("a.jsonl", rows), tokenizer=tokenizer, streaming=True, num_workers=workers)
    (batch,) = module.train_dataloader()
    texts = {tokenizer.decode(ids) for ids in batch["chosen"]["input_ids"]}
    assert texts == {f"<bos> mia visits the {x} . <eos>" for x in ("farm", "hotel")}


def test_pairs_of_conversations_share_all_turns_but_the_last() -> None:
    other = {"role": "assistant", "content": "Nobody goes."}
    turns = (Turn("user", "Who goes where?"),)
    for row in (
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, other], "prompt": "Who goes where?"},
        {"chosen": [ANSWERED], "rejected": [other], "prompt": [ASKED]},
    ):
        assert read("preferences", [row]) == [Preference(turns, "Mia goes home.", "Nobody goes.", None, "a.jsonl:1")]


@pytest.mark.parametrize(("label", "chosen"), [(1, "b"), (2, "c"), ("2", "c")])
def test_of_two_outputs_the_label_names_the_better_one(label: Any, chosen: str) -> None:
    (pair,) = read("preferences", [{"input": "a", "output_1": "b", "output_2": "c", "label": label}])
    assert pair.chosen == chosen


@pytest.mark.parametrize("label", [0, 3, True, None, "one"])
def test_a_label_out_of_range_is_refused(label: Any) -> None:
    row = {"input": "a", "output_1": "b", "output_2": "c", "label": label}
    with pytest.raises(DataError, match=r"a.jsonl:1: 'label' must be 1 \(output_1 is better\) or 2"):
        read("preferences", [row])


def test_labelled_answers_are_desirable_or_not_and_nothing_else() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": 0}]
    assert [(row.response, row.desirable) for row in read("labelled", rows)] == [("b", True), ("c", False)]
    with pytest.raises(DataError, match=r"a.jsonl:1: 'label' must be 0 \(negative\) or 1 \(positive\), found 2"):
        read("labelled", [{"prompt": "a", "response": "b", "label": 2}])


def test_columns_that_fit_two_schemas_are_refused_with_both_and_the_choice() -> None:
    row = {"messages": [ASKED, ANSWERED], "instruction": "a", "output": "b"}
    message = (
        r"(?s)fit 2 schemas:\n  messages, by messages: a.jsonl:1\n"
        r"  alpaca, by instruction, output: .*to messages or alpaca"
    )
    with pytest.raises(DataError, match=message):
        read("instructions", [row])
    assert read("instructions", [row], schema="alpaca") == [Instruction("a", "b", "a.jsonl:1")]


def test_rows_of_two_schemas_in_one_file_are_refused_with_a_line_of_each() -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}, {"instruction": "a", "output": "b"}]
    message = (
        r"(?s)mixes rows of two schemas:\n  prompt_response, by prompt, response: a.jsonl:1\n  alpaca, .*: a.jsonl:3"
    )
    with pytest.raises(DataError, match=message):
        read("instructions", rows)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_two_schemas_are_refused_in_either_order(order: tuple[int, int]) -> None:
    """Also where the columns of one row are among those of the other."""
    rows = [{"prompt": "a"}, {"prompt": "a", "response": "b"}]
    with pytest.raises(
        DataError, match=r"(?s)mixes rows of two schemas:\n.*: a.jsonl:1\n.*: a.jsonl:2\n.*or set schema"
    ):
        read("prompts", [rows[index] for index in order])
    assert [prompt.text for prompt in read("prompts", [rows[index] for index in order], schema="prompt")] == ["a", "a"]


def test_two_files_may_have_two_schemas(write: Callable[..., str], tokenizer: Any) -> None:
    names = [
        write("a.jsonl", [{"prompt": "mia visits", "response": "the farm ."}]),
        write("b.jsonl", [{"instruction": "tom leaves", "output": "the hotel ."}]),
    ]
    module = InstructionDataModule(names, tokenizer=tokenizer)
    (batch,) = module.train_dataloader()
    assert len(batch["input_ids"]) == 2


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "pirate", "content": "x"}], "turn 1 of 'messages': must say who speaks.*found 'pirate'"),
        ([ASKED, {"role": "assistant"}], "turn 2 of 'messages': 'content' or 'value' must be text"),
        ([ASKED, {"role": "assistant", "content": [{"type": "image"}]}], "turn 2 .* must be text"),
        ([ASKED, {"role": "assistant", "content": "\ud800"}], "turn 2 .* half of a surrogate pair"),
        (["hi"], "turn 1 .* expected an object with role and content, found 'hi'"),
        ([], r"'messages' must be a list of turns, or columns of equal length, found \[\]"),
        ({"role": ["user", "assistant"], "content": ["a"]}, "'messages' must be .* columns of equal length, found {"),
        ([ASKED, CALLS], "turn 2 of 'messages': 'tool_calls' would be lost, as a turn is text: write the call into"),
        ([ASKED, {**CALLS, "content": None}], "turn 2 of 'messages': 'tool_calls' would be lost"),
        ([ASKED, {"role": "assistant", "content": "", "function_call": {"name": "f"}}], "turn 2 .*'function_call' wou"),
        ([ASKED], "no turn is the assistant's, so there is nothing to learn"),
    ],
)
def test_what_is_wrong_with_a_turn_is_said_with_its_number(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl:1: {message}"):
        read("instructions", [{"messages": turns}])


def test_contents_in_parts_and_conversations_in_columns_are_read() -> None:
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Mia "}, {"type": "text", "text": "goes."}]}
    assert read("instructions", [{"messages": [ASKED, parts]}])[0].turns[1] == Turn("assistant", "Mia goes.")
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert read("instructions", [{"conversations": columns}])[0].turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_what_was_recognised_is_said_in_one_line(write: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = write("a.jsonl", [{"chosen": "mia visits", "rejected": "mia leaves"}] * 2)
    with caplog.at_level("INFO", logger="lightning_hybrid"):
        PreferenceDataModule(name, tokenizer=tokenizer).setup()
    said = [record.getMessage() for record in caplog.records if "read as" in record.getMessage()]
    assert said == [f"{name}: 2 rows read as chosen_rejected, from the columns chosen, rejected; 2 of no named prompt"]


def test_keys_that_are_set_decide_alone(write: Any, tokenizer: Any) -> None:
    name = write("a.jsonl", [{"prompt": "mia", "response": "visits", "question": "tom leaves", "answer": "x"}])
    module = PromptDataModule(name, tokenizer=tokenizer, prompt_key="question", batch_size=1)
    assert next(iter(module.train_dataloader()))["prompts"] == ["tom leaves"]
    with pytest.raises(ConfigError, match="schema 'alpaca' and prompt_key are both set"):
        PromptDataModule(name, tokenizer=tokenizer, prompt_key="question", schema="alpaca").setup()


def test_a_schema_that_does_not_serve_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="schema must be one of auto, keys, chosen_rejected, sharegpt_pairs, two_out"):
        PreferenceDataModule("a.jsonl", schema="alpaca")


def test_ids_that_occur_again_are_counted_and_shown(write: Any, tokenizer: Any, notices: list[str]) -> None:
    rows = [{"id": id_, "prompt": "mia", "response": "visits"} for id_ in ("x", "y", "x", None, None)]
    name = write("a.jsonl", rows)
    for streaming in (False, True):
        InstructionDataModule(name, tokenizer=tokenizer, streaming=streaming).setup()
    said = f"1 of 5 rows of {name} have the id of another row, such as {name}:1 and {name}:3; all of them are used"
    assert [*notices] == [said, said]


def test_the_same_prompt_is_never_on_both_sides(write: Any, tokenizer: Any) -> None:
    rows = [
        {"prompt": f"mia visits the {place} .", "chosen": f"the soup is {how} .", "rejected": "the ice is soft ."}
        for place in ("farm", "hotel", "market", "museum", "school", "harbour")
        for how in ("warm", "dark", "cold")
    ]
    name = write("a.jsonl", rows)
    for streaming in (False, True):
        module = PreferenceDataModule(name, tokenizer=tokenizer, validation_fraction=0.4, streaming=streaming)
        prompts = [
            {
                tokenizer.decode(ids[mask & ~loss])
                for batch in loader
                for side in [batch["chosen"]]
                for ids, mask, loss in zip(side["input_ids"], side["attention_mask"], side["loss_mask"], strict=True)
            }
            for loader in (module.train_dataloader(), module.val_dataloader())
        ]
        assert len(prompts[0]) + len(prompts[1]) == 6
        assert prompts[0].isdisjoint(prompts[1])
        assert all(prompts)


REAL: list[tuple[Any, str, str, int, str]] = [
    (PromptDataModule, "gsm8k_train.jsonl", "question_answer", 7473, "prompts"),
    (InstructionDataModule, "gsm8k_train.jsonl", "question_answer", 7473, "instructions"),
    (InstructionDataModule, "llamafactory_alpaca_en_demo.json", "alpaca", 999, "instructions"),
    (PreferenceDataModule, "llamafactory_dpo_en_demo.json", "sharegpt_pairs", 300, "preferences"),
    (PreferenceDataModule, "hh_rlhf_harmless_base_test.jsonl.gz", "chosen_rejected", 2312, "preferences"),
    (PreferenceDataModule, "llmbar_natural.json", "two_outputs", 100, "preferences"),
]


@pytest.mark.parametrize(("module", "file", "schema", "count", "task"), REAL)
def test_real_files_are_recognised(shared: Any, module: Any, file: str, schema: str, count: int, task: Task) -> None:
    rows = read_rows(str(shared / "data" / file))
    recogniser = Recogniser(task)
    assert {recogniser.schema_of(row).name for row in rows} == {schema}  # type: ignore[union-attr]
    assert len(read(task, [row.fields for row in rows])) == count


def test_the_transcripts_of_real_people_share_their_prompt(shared: Any) -> None:
    rows = [row.fields for row in read_rows(str(shared / "data/hh_rlhf_harmless_base_test.jsonl.gz"))]
    for pair, row in zip(read("preferences", rows), rows, strict=True):
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


def test_real_pairs_of_conversations_have_the_texts_of_their_file(shared: Any) -> None:
    rows = json.loads((shared / "data/llamafactory_dpo_en_demo.json").read_text())
    for pair, row in zip(read("preferences", rows), rows, strict=True):
        assert pair.chosen == row["chosen"]["value"]
        assert [turn.content for turn in pair.prompt] == [turn["value"] for turn in row["conversations"]]

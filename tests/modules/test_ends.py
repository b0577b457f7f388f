"""Responses end where the chat template ends a turn, in rollouts and where the exported folder is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data import PromptDataModule
from lightning_hybrid.data.templates import SHIPPED, use_template
from lightning_hybrid.export import export_model
from lightning_hybrid.models import Policy, build_policy, end_of_text_ids, end_of_turn_id
from tests.helpers import TINY_LLAMA, quiet_trainer
from tests.rewards.chats import byte_pairs


def indifferent_policy(vocabulary: int) -> Policy:
    """All tokens are equally probable, so that sampled responses hold those that end them, too."""
    policy = build_policy(TINY_LLAMA | {"max_position_embeddings": 256, "eos_token_id": 1}, vocabulary)
    torch.nn.init.zeros_(policy.model.lm_head.weight)
    return policy


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_a_rollout_ends_with_a_turn_of_a_template_that_the_data_brings(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"is it {n}?"}]} for n in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_pairs()
    turn_ends, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    ppo = PPOModule(
        indifferent_policy(len(tokenizer)),
        lambda prompts, responses: [0.0] * len(responses),
        PPOConfig(missing_eos_penalty=1.0),
        RolloutConfig(max_new_tokens=60, backend=backend),
        tokenizer,
    )
    data = PromptDataModule(str(path), template="chatml", batch_size=32)
    quiet_trainer("hybrid_deepspeed", max_steps=1).fit(ppo, datamodule=data)
    rollout = ppo.last_rollout
    by_turn = [row for row, tokens in enumerate(rollout.responses) if turn_ends in tokens]
    assert by_turn
    for row, tokens in enumerate(rollout.responses):
        ended = tokens[-1] in (turn_ends, eos)
        assert turn_ends not in tokens[:-1]
        assert eos not in tokens[:-1]
        assert rollout.finish_reasons[row] == ("eos" if ended else "length")
        assert bool(rollout.finished[row]) == ended
        assert len(tokens) == int(rollout.response_mask[row].sum()) == int(rollout.lengths[row])


def test_plain_generate_of_an_exported_folder_ends_with_a_turn(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    use_template(tokenizer, "chatml")
    turn_ends, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    export_model(indifferent_policy(len(tokenizer)), tmp_path / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == [eos, turn_ends]
    torch.manual_seed(0)
    prompts = torch.full((64, 3), 20)
    said = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=60, pad_token_id=0)[:, 3:].tolist()
    ended = [row for row in said if turn_ends in row]
    assert ended
    assert all(set(row[row.index(turn_ends) + 1 :]) <= {0} for row in ended)


def test_one_end_is_written_as_a_number(tmp_path: Path) -> None:
    tokenizer = byte_pairs()
    export_model(indifferent_policy(len(tokenizer)), tmp_path / "model", tokenizer)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (SHIPPED["chatml"], "<|im_end|>"),
        (SHIPPED["plain"], "</s>"),
        (None, None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}", None),
    ],
    ids=["chatml", "plain", "none", "without an end", "refusing", "no jinja"],
)
def test_the_end_of_a_turn_is_the_special_token_behind_an_answer(template: str | None, end: str | None) -> None:
    tokenizer = byte_pairs()
    tokenizer.chat_template = template
    found = end_of_turn_id(tokenizer)
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    ends = end_of_text_ids(indifferent_policy(len(tokenizer)).model, tokenizer)
    assert ends == sorted({tokenizer.eos_token_id} | ({found} - {None}))

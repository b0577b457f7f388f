from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.checkpoint import ResumableLoader
from lightning_hybrid.data import InstructionDataModule, PromptDataModule
from lightning_hybrid.data.mixing import WINDOW, Order
from lightning_hybrid.errors import ConfigError
from tests.data.training import rows_of, train_and_resume

MIA = [{"prompt": f"mia visits {'the ' * n}"} for n in range(1, 21)]
TOM = [{"prompt": f"tom leaves {'the ' * n}"} for n in range(1, 11)]


def mixed(write: Any, tokenizer: Any, **arguments: Any) -> PromptDataModule:
    paths = [write("mia.jsonl", MIA), write("tom.jsonl", TOM)]
    return PromptDataModule(paths, **({"tokenizer": tokenizer, "batch_size": 5, "mix": [0.8, 0.2]} | arguments))


def prompts(batches: Any) -> list[str]:
    return [text for batch in batches for text in batch["prompts"]]


def test_sources_are_drawn_with_their_shares() -> None:
    order = Order([[3000], [7000]], [0.7, 0.3], seed=1, epoch=lambda: 0)
    # 10,000 draws: the count of the first has a standard deviation of sqrt(10000 · 0.7 · 0.3) = 46
    assert abs(int((torch.tensor(list(order)) < 3000).sum()) - 7000) < 200


def test_a_source_gives_every_row_once_before_any_twice() -> None:
    order = torch.tensor(list(Order([[100], [900]], [0.5, 0.5], seed=1, epoch=lambda: 0)))
    small = order[order < 100]
    assert 350 < len(small) < 650
    for begin in range(0, len(small) // 100 * 100, 100):
        assert sorted(small[begin : begin + 100].tolist()) == list(range(100))
    large = order[order >= 100]
    assert len(set(large.tolist())) == len(large)


def test_shares_need_not_sum_to_one() -> None:
    assert list(Order([[30], [70]], [7, 3], 0, lambda: 2)) == list(Order([[30], [70]], [0.7, 0.3], 0, lambda: 2))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return list(Order([[30], [70]], [0.7, 0.3], seed, lambda: epoch))

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_dealt_the_order_of_one_process(ranks: int) -> None:
    for blocks, shares in (([[30], [60]], [0.7, 0.3]), ([[4] * 15], None)):
        dealt = [list(Order(blocks, shares, 0, 1, ranks, rank)) for rank in range(ranks)]
        assert [index for turn in zip(*dealt, strict=True) for index in turn] == list(Order(blocks, shares, 0, 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_decides_the_order_on_any_number_of_ranks(write: Any, tokenizer: Any, streaming: bool) -> None:
    name = write("mia.jsonl", MIA)

    def steps(ranks: int, seed: int) -> list[list[str]]:
        loaders = []
        for rank in range(ranks):
            module = PromptDataModule(name, tokenizer=tokenizer, batch_size=4 // ranks, seed=seed, streaming=streaming)
            module.trainer = OneRank(0, ranks, rank)  # type: ignore[assignment]
            loaders.append(module.train_dataloader())
        batches = [[batch["prompts"] for batch in loader] for loader in loaders]
        return [[text for row in zip(*step, strict=True) for text in row] for step in zip(*batches, strict=True)]

    assert steps(1, seed=3) == steps(2, seed=3) == steps(4, seed=3)
    assert steps(1, seed=3) != steps(1, seed=4)


def test_an_order_that_does_not_come_out_even_begins_again() -> None:
    order = list(Order([[7]], None, 0))
    shares = [list(Order([[7]], None, 0, 0, 3, rank)) for rank in range(3)]
    assert [index for turn in zip(*shares, strict=True) for index in turn] == [*order, *order[:2]]


@pytest.mark.slow
def test_two_ranks_train_in_the_order_of_one_and_go_on_in_the_middle_of_an_epoch(
    write: Any, tokenizer: Any, run_ranks: Any, tmp_path: Path
) -> None:
    """Of mixed sources, one of them in row groups, which are read together."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table, lines = str(tmp_path / "mia.parquet"), write("tom.jsonl", [row("tom", n) for n in range(30)])
    parquet.write_table(pyarrow.Table.from_pylist([row("mia", n) for n in range(60)]), table, row_group_size=5)
    arguments = {"mix": [0.8, 0.2], "streaming": True, "max_length": 128}
    whole = train_and_resume(run_ranks, [table, lines], tmp_path, 16, **arguments)

    for epoch, steps in ((0, whole_batches(whole, 0)), (1, whole_batches(whole, 1))):
        module = InstructionDataModule([table, lines], tokenizer=tokenizer, batch_size=8, **arguments)  # type: ignore[arg-type]
        module.trainer = OneRank(epoch)  # type: ignore[assignment]
        alone = [rows_of(batch) for batch in module.train_dataloader()]
        assert len(steps) > 3
        assert steps == alone[: len(steps)]


def row(name: str, number: int) -> dict[str, str]:
    return {"prompt": f"{name} visits", "response": "the " * (number + 1)}


def whole_batches(given: list[Any], epoch: int) -> list[list[list[int]]]:
    """The rows of each step of an epoch, of both ranks in turn; without the last step, which is not full."""
    steps = [
        [own for both in zip(one, other, strict=True) for own in both]
        for (number, one), (_, other) in zip(*given, strict=True)
        if number == epoch
    ]
    return [step for step in steps if len(step) == 8]


class OneRank:
    """What a data module asks a trainer for."""

    lightning_module = None

    def __init__(self, epoch: int, ranks: int = 1, rank: int = 0) -> None:
        self.current_epoch, self.world_size, self.global_rank = epoch, ranks, rank


def test_blocks_are_read_a_few_at_a_time_and_every_row_once() -> None:
    sizes = [10] * 20
    order = list(Order([sizes], None, seed=0, epoch=lambda: 0))
    assert sorted(order) == list(range(200))
    windows = [{index // 10 for index in order[i : i + 10 * WINDOW]} for i in range(0, 200, 10 * WINDOW)]
    assert [len(window) for window in windows] == [WINDOW] * (20 // WINDOW)
    assert order[:10] != sorted(order[:10])


def test_batches_hold_both_sources_and_prompts_their_own_index(write: Any, tokenizer: Any) -> None:
    module = mixed(write, tokenizer)
    batches = list(module.train_dataloader())
    assert len(prompts(batches)) == 30
    names = {index: text for batch in batches for index, text in zip(batch["index"], batch["prompts"], strict=True)}
    rows = [*MIA, *TOM]
    assert all(text == rows[index]["prompt"] for index, text in names.items())
    assert {text.split()[0] for text in names.values()} == {"mia", "tom"}


def test_what_is_mixed_is_said_with_its_counts(write: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = mixed(write, tokenizer)
    with caplog.at_level("INFO", logger="lightning_hybrid"):
        drawn = prompts(module.train_dataloader())
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mixing")]
    mia = sum(text.startswith("mia") for text in drawn)
    assert said.startswith(f"mixing 80.0% {module.path[0]} ({mia} of an epoch's 30 draws, 20 rows, each {mia / 20:.2f}")
    assert f"20.0% {module.path[1]} ({30 - mia} of an epoch's 30 draws, 10 rows" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_in_the_middle_of_an_epoch_of_mixed_sources(write: Any, tokenizer: Any, streaming: bool) -> None:
    loader = ResumableLoader(mixed(write, tokenizer, streaming=streaming).train_dataloader())
    batches = iter(loader)
    done = [next(batches) for _ in range(2)]
    position = loader.position(finished=True)
    rest = prompts(batches)
    torch.rand(5)
    again = ResumableLoader(mixed(write, tokenizer, streaming=streaming).train_dataloader())
    again.resume_at(position)
    assert prompts(again) == rest
    assert len(prompts(done)) + len(rest) == 30


def test_a_held_out_row_of_a_mixture_is_never_trained_on(write: Any, tokenizer: Any) -> None:
    module = mixed(write, tokenizer, validation_fraction=0.3, batch_size=1)
    held_out = set(prompts(module.val_dataloader()))
    assert held_out
    assert held_out.isdisjoint(prompts(module.train_dataloader()))


def test_the_limit_holds_for_each_source(write: Any, tokenizer: Any) -> None:
    for streaming in (False, True):
        module = mixed(write, tokenizer, limit=4, batch_size=1, mix=[1, 1], streaming=streaming)
        assert set(prompts(module.train_dataloader())) <= {row["prompt"] for row in (*MIA[:4], *TOM[:4])}
        assert len(module.train_dataloader()) == 8


@pytest.mark.parametrize(
    ("path", "mix", "message"),
    [
        ("a.jsonl", [0.5, 0.5], "mix needs one share for each path, each named once: 2 shares, path a.jsonl"),
        (["a.jsonl", "a.jsonl"], [1, 1], "each named once"),
        (["a.jsonl", "b.jsonl"], [1, 0], r"mix must be numbers above 0, found \[1\.0, 0\.0\]"),
        (["a.jsonl", "b.jsonl"], [1, float("nan")], "mix must be numbers above 0"),
    ],
)
def test_shares_that_do_not_fit_are_refused(path: Any, mix: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptDataModule(path, mix=mix)

"""What a run leaves for its report, however it ends."""

from __future__ import annotations

import json
import warnings
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid.callbacks import Interrupted, MetricsFile, SampleLog
from lightning_hybrid.report.callback import RunReport
from lightning_hybrid.settings import without_credentials
from tests.callbacks.test_samples import Writer
from tests.helpers import quiet_trainer
from tests.modules.test_online_algorithms import of, online
from tests.modules.test_ppo import prompts
from tests.report.test_run_page import titles

CONFIG = {"seed": 3, "reward": {"url": "https://user:secret@judge.example/score"}}


class At(L.Callback):
    """Do something in the batch after `step` steps."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act()


def fail(error: BaseException) -> Any:
    def raise_it() -> None:
        raise error

    return raise_it


def trainer_of(folder, *callbacks, steps=4):
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks],
        logger=MetricsFile(folder),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def rows():
    return torch.utils.data.DataLoader(torch.ones(4, 1))


def fit(folder, *callbacks, module=None, steps=4, ckpt_path=None):
    report = RunReport(folder, "3/3 ppo", without_credentials(CONFIG))
    trainer = trainer_of(folder, *callbacks, report, steps=steps)
    trainer.fit(module or Logging(), rows(), ckpt_path=ckpt_path)
    return trainer


class Logging(Writer):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("reward/score", self.raw_scores.mean())
        return loss


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_that_ends_has_facts_and_a_report(tmp_path):
    fit(tmp_path, SampleLog(tmp_path / "samples.jsonl", every=2, rows=2))
    assert facts(tmp_path).items() >= {"stage": "3/3 ppo", "status": "finished", "steps": 4, "planned_steps": 4}.items()
    assert facts(tmp_path)["device"] == "1 × CPU"
    assert facts(tmp_path)["seconds"] > 0
    assert {"python", "torch", "lightning"} <= facts(tmp_path)["versions"].keys()
    expected = ["Curves", "Responses, at the beginning and at the end", "Samples", "Configuration", "Versions"]
    assert titles(tmp_path / "report.html") == expected


def test_the_last_metrics_are_in_the_report(tmp_path):
    fit(tmp_path)
    assert "training 3.42" in (tmp_path / "report.html").read_text().replace("<em>", "").replace("</em>", "")


def test_rollouts_are_kept_from_the_first_and_the_last_iterations(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_hybrid.report.callback._ENOUGH", 4)  # two iterations of three responses
    fit(tmp_path)
    ends = json.loads((tmp_path / "rollouts.json").read_text())
    assert [ends["first"]["steps"], ends["last"]["steps"]] == [[1, 2], [3, 4]]
    assert ends["first"]["length"] == [3, 3, 3] * 2
    assert ends["last"]["score"] == [3.5, 1.75, 2.0, 4.5, 2.75, 3.0]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted(130), "interrupted"),
        (ValueError("the judge is away\nfor today"), "ended by ValueError: the judge is away"),
        (ValueError("no answer from https://judge.example/?key=s3cret"), "no answer from https://judge.example/?…"),
    ],
)
def test_a_run_that_is_stopped_or_fails_has_a_report_of_what_there_is(tmp_path, error, status):
    with pytest.raises(type(error)):
        fit(tmp_path, At(2, fail(error)))
    assert status in facts(tmp_path)["status"]
    assert "s3cret" not in facts(tmp_path)["status"]
    assert facts(tmp_path)["steps"] == 2
    assert status in (tmp_path / "report.html").read_text()


def test_a_run_that_is_killed_leaves_its_settings(tmp_path):
    class Seen(Exception):
        pass

    def look() -> None:
        assert facts(tmp_path)["status"] == "running, or killed"
        assert facts(tmp_path)["config"]["seed"] == 3
        raise Seen

    with pytest.raises(Seen):
        fit(tmp_path, At(1, look))


def test_a_run_that_goes_on_keeps_its_beginning_and_its_time(tmp_path):
    trainer = fit(tmp_path / "run", steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    before = facts(tmp_path / "run")["seconds"]
    fit(tmp_path / "run", steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert facts(tmp_path / "run")["seconds"] > before
    ends = json.loads((tmp_path / "run" / "rollouts.json").read_text())
    assert ends["first"]["steps"] == [1, 4]
    assert len(ends["first"]["length"]) == 12


def test_a_run_that_was_killed_has_the_time_until_its_checkpoint_beside_it_and_not_in_it(tmp_path):
    class Seen(Exception):
        pass

    def save_and_look() -> None:
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        left.update(facts(tmp_path))
        raise Seen

    left: dict[str, Any] = {}
    report = RunReport(tmp_path, "ppo", {})
    trainer = trainer_of(tmp_path, At(2, save_and_look), report)
    with pytest.raises(Seen):
        trainer.fit(Logging(), rows())
    assert (left["status"], left["steps"]) == ("running, or killed", 2)
    assert left["seconds"] > 0
    assert report.state_dict().keys() == {"first", "last"}
    before = left["seconds"] = 1000.0
    (tmp_path / "run.json").write_text(json.dumps(left))  # as one that is killed there leaves it
    fit(tmp_path, steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert before < facts(tmp_path)["seconds"] < before + 100
    fit(tmp_path, steps=4)
    assert facts(tmp_path)["seconds"] < 100


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning's own
def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    def spoil() -> None:
        (tmp_path / "samples.jsonl").write_text("no json\n")

    with pytest.warns(UserWarning, match=r"no report in .*: DataError: .*samples\.jsonl:1: not a sample"):
        trainer = fit(tmp_path, At(4, spoil))
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@judge.example/score", "https://…@judge.example/score"),
        ("https://judge.example/score?api_key=secret&n=1", "https://judge.example/score?…"),
        ("https://user:secret@judge.example?token=secret#part", "https://…@judge.example?…#part"),
        ("data/rows-?.jsonl", "data/rows-?.jsonl"),
    ],
)
def test_addresses_lose_their_passwords_and_queries(address, shown):
    assert without_credentials({"a": [{"b": address}]}) == {"a": [{"b": shown}]}
    assert without_credentials(f"asked {address} in vain") == f"asked {shown} in vain"


def test_other_settings_are_as_they_were():
    kept = {"path": "a@b/c", "n": [1, None, "http://host/x@y"]}
    assert without_credentials(kept) == kept


def test_responses_of_a_real_policy_have_their_kl_to_the_reference(tmp_path):
    module = online(of("grpo"))
    report = RunReport(tmp_path, "ppo", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer("hybrid_deepspeed", max_steps=3, callbacks=[report], logger=MetricsFile(tmp_path))
        trainer.fit(module, prompts(rows=32, batch_size=8))
    ends = json.loads((tmp_path / "rollouts.json").read_text())
    kl, lengths = ends["last"]["kl"], ends["last"]["length"]
    assert len(kl) == len(lengths) == 3 * 8 * 4
    assert kl[:32] == pytest.approx([0.0] * 32, abs=1e-4)  # the first iteration samples from the reference itself
    assert max(map(abs, kl[32:])) > 1e-3
    assert sum(kl[64:]) / 32 == pytest.approx(float(trainer.callback_metrics["policy/kl"]), abs=1e-4)
    assert "KL to the reference" in (tmp_path / "report.html").read_text()

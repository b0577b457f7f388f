"""What stands between a command and its workers, without a cluster."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_hybrid.callbacks.signals import SAME_SECONDS, SignalWatch, hear_from
from lightning_hybrid.checkpoint import manifest
from lightning_hybrid.clusters.beginning import Mark, begin
from lightning_hybrid.clusters.connection import Share, refuse_what_does_not_fit
from lightning_hybrid.clusters.demand import shares_of
from lightning_hybrid.clusters.environment import Place, RayEnvironment
from lightning_hybrid.clusters.lines import Lines, without_prefixes
from lightning_hybrid.clusters.order import Order, code_folders, secret_variables, shown_variables
from lightning_hybrid.clusters.servers import gpus_of_server
from lightning_hybrid.clusters.stopping import Stop
from lightning_hybrid.config import GRPOConfig, LauncherConfig, PPORun, SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.strategy import HybridDeepSpeedStrategy
from tests.conftest import RunRanks

SFT = ["model.path=a-model", "data.path=rows.jsonl", "trainer=cpu", "trainer.devices=2", "launcher=ray"]
PPO = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-model", "trainer.devices=4", "launcher=ray"]


def sft(folder: Path, *changes: str) -> SFTRun:
    return compose_run("sft", SFTRun, [*SFT, f"output_dir={folder}", *changes])


def ppo(*changes: str) -> PPORun:
    return compose_run("ppo", PPORun, [*PPO, *changes])


# ---- the order -------------------------------------------------------------------------------------------------------


def do_nothing(run: object) -> None:
    """A job."""


def test_an_order_is_sent_and_read_as_the_settings_that_were_given(tmp_path: Path) -> None:
    from ray import cloudpickle

    run = ppo("algorithm=grpo", "algorithm.kl_coef=0.25", f"output_dir={tmp_path}")
    run = run.model_copy(update={"root": "a${b"})  # no interpolation
    order = cloudpickle.loads(cloudpickle.dumps(Order.of(do_nothing, run, "abc")))
    assert order.run() == run
    assert isinstance(order.run().algorithm, GRPOConfig)
    assert order.folder == str(Path.cwd())


def test_secrets_are_not_shown_and_what_belongs_to_the_host_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "JUDGE_TOKEN": "t",
        "WANDB_API_KEY": "k",
        "HTTPS_PROXY": "http://me:word@proxy:3128",
        "PLAIN": "p",
        "RANK": "3",
        "SLURM_JOB_ID": "7",
    }.items():
        monkeypatch.setenv(name, value)
    shown, secret = shown_variables(), secret_variables()
    assert (secret["JUDGE_TOKEN"], secret["WANDB_API_KEY"]) == ("t", "k")
    assert secret["HTTPS_PROXY"] == "http://me:word@proxy:3128"
    assert not [value for value in shown.values() if "me:word" in value]
    assert shown["PLAIN"] == "p"
    assert not {"JUDGE_TOKEN", "WANDB_API_KEY", "PATH", "HOME", "RANK", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"} & {
        *shown
    }
    assert not {"PLAIN", "RANK", "SLURM_JOB_ID"} & {*secret}


def test_code_is_found_where_the_command_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "recipes"), "", *sys.path])
    folders = code_folders()
    assert folders[:2] == [str(tmp_path / "recipes"), str(tmp_path)]
    assert not [folder for folder in folders if "site-packages" in folder or folder.endswith("lib-dynload")]
    assert shown_variables()["PYTHONPATH"].split(os.pathsep) == folders


# ---- what a run demands ----------------------------------------------------------------------------------------------


def test_each_rank_has_a_gpu_unless_it_trains_on_the_cpu(tmp_path: Path) -> None:
    assert shares_of(ppo("trainer.accelerator=gpu", "trainer.num_nodes=2")) == [Share("ranks", 8, 1.0, 1.0)]
    assert shares_of(ppo("trainer.accelerator=gpu", "launcher.gpus_per_rank=0.75")) == [Share("ranks", 4, 1.0, 0.75)]
    assert shares_of(sft(tmp_path, "launcher.cpus_per_rank=3.0")) == [Share("ranks", 2, 3.0, 0.0)]
    assert Share("ranks", 2, 3.0, 0.0).resources() == {"CPU": 3.0}


def test_servers_have_the_devices_that_they_use() -> None:
    assert gpus_of_server(LauncherConfig(name="ray"), True, 2) == 2.0
    assert gpus_of_server(LauncherConfig(name="ray"), True, None) == 1.0
    assert gpus_of_server(LauncherConfig(name="ray"), False, None) == 0.0
    assert gpus_of_server(LauncherConfig(name="ray", gpus_per_server=0.5), True, 2) == 0.5


class Cluster:
    """What is asked of Ray about its nodes."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(node.get(name, 0.0) for node in self._nodes) for name in ("CPU", "GPU")}


def test_a_cluster_that_could_hold_the_run_is_taken() -> None:
    refuse_what_does_not_fit(
        Cluster({"CPU": 4.0, "GPU": 2.0}), [Share("ranks", 2, 1.0, 1.0), Share("engines", 2, 1.0, 0.0)]
    )


@pytest.mark.parametrize(
    ("nodes", "shares", "problem"),
    [
        (
            [{"CPU": 4.0}],
            [Share("ranks", 8, 1.0, 0.0)],
            r"too small: 8 CPU are needed and it has 4 \(demanded: 8 ranks",
        ),
        ([{"CPU": 4.0}], [Share("ranks", 3, 1.0, 0.0), Share("engines", 2, 1.0, 0.0)], "5 CPU are needed and it has 4"),
        ([{"CPU": 9.0, "GPU": 1.0}], [Share("ranks", 2, 1.0, 1.0)], "2 GPU are needed and it has 1"),
        ([{"CPU": 2.0}] * 4, [Share("ranks", 2, 4.0, 0.0)], "one of the ranks needs 4 CPU and no node has more than 2"),
    ],
)
def test_one_that_could_not_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], shares: list[Share], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        refuse_what_does_not_fit(Cluster(*nodes), shares)


# ---- where ranks begin -----------------------------------------------------------------------------------------------


def keep(folder: Path, name: str) -> Path:
    """A complete checkpoint, without content."""
    path = folder / "checkpoints" / name
    path.mkdir(parents=True)
    facts = {"global_step": int(name[5:11]), "ranks": 2, "stage": 1, "engines": [], "loaders": 0, "frozen": {}}
    manifest.write_manifest(path, [], {**facts, "config": None})
    return path


def test_a_first_start_begins_where_the_command_says(tmp_path: Path) -> None:
    keep(tmp_path, "step=000009.ckpt")
    run = sft(tmp_path, "ckpt_path=some.ckpt")
    assert begin(run, "abc") == run
    assert (tmp_path / ".ray-abc.json").exists()


def test_after_a_loss_a_run_goes_on_from_its_own_newest_checkpoint_only(tmp_path: Path) -> None:
    keep(tmp_path, "step=000009.ckpt")  # an earlier run's
    fresh, named, last = sft(tmp_path), sft(tmp_path, "ckpt_path=some.ckpt"), sft(tmp_path, "ckpt_path=last")
    begin(fresh, "abc")
    assert begin(fresh, "abc").ckpt_path is None
    assert begin(named, "abc").ckpt_path == "some.ckpt"
    assert begin(last, "abc").ckpt_path == str(tmp_path / "checkpoints" / "step=000009.ckpt")
    own = keep(tmp_path, "step=000002.ckpt")
    assert {begin(run, "abc").ckpt_path for run in (fresh, named, last)} == {str(own)}


def test_last_that_found_nothing_at_first_starts_anew_after_a_loss(tmp_path: Path) -> None:
    run = sft(tmp_path, "ckpt_path=last")
    begin(run, "abc")
    (tmp_path / "checkpoints" / "step=000002.ckpt").mkdir(parents=True)  # half of one
    assert begin(run, "abc").ckpt_path is None


def begin_in_folders_of_their_own(folder: str) -> None:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    run = sft(Path(folder) / f"host{rank}")
    try:
        begin(run, "abc", patience=1.0)
        print("began")
    except ConfigError as error:
        print(error)


def test_folders_that_are_not_shared_are_refused_on_every_rank(run_ranks: RunRanks, tmp_path: Path) -> None:
    said = run_ranks(begin_in_folders_of_their_own, 2, str(tmp_path))
    assert all("is not one folder for all ranks" in text and "not seen by rank 1 on" in text for text in said)


def test_a_mark_is_set_once(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "new" / ".ray-abc.json")
    assert mark.set()
    assert not mark.set()
    assert mark.is_seen(0.0)


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_a_signal_to_the_command_reaches_rank_0(tmp_path: Path) -> None:
    mark = Mark(tmp_path / ".ray-abc.json")
    mark.set()
    command, rank_0 = Stop(mark), Stop(mark)
    with command.watching():
        command.pass_on()
        assert rank_0.asked() == set()
        assert command.exit_code is None
        for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 0)):  # the second within a second is the same
            os.kill(os.getpid(), number)
            command.pass_on()
            assert rank_0.asked() == {signal.SIGTERM}
            assert command.exit_code == code
    command.forget()
    assert rank_0.asked() == set()
    assert [path.name for path in tmp_path.iterdir()] == [".ray-abc.json"]


def test_ctrl_c_ends_a_run_that_has_not_begun_at_once(tmp_path: Path) -> None:
    stop = Stop(Mark(tmp_path / ".ray-abc.json"))
    with stop.watching():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.pass_on()
    assert stop.exit_code == 130


def test_a_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    stop = Stop(Mark(tmp_path / ".ray-abc.json"))
    with stop.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1 * SAME_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_rank_hears_of_the_commands_signals_as_of_its_own() -> None:
    watch = SignalWatch([signal.SIGTERM], lambda: "", lambda: None, KeyboardInterrupt)
    hear_from(lambda: {signal.SIGTERM, signal.SIGUSR1})
    try:
        assert watch.received == {signal.SIGTERM}
    finally:
        hear_from(None)
    assert watch.received == set()


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_a_bar_becomes_a_line_now_and_then() -> None:
    stream = io.StringIO()
    lines = Lines(stream, seconds=1000.0)
    lines.write("begun\n")
    for n in range(100):
        lines.write(f"\rsft: {n}%")
    lines.write("\n")
    lines.write("ended\n")
    assert stream.getvalue() == "begun\nsft: 0%\nsft: 99%\nended\n"


def test_the_last_state_of_a_bar_is_said_once() -> None:
    stream = io.StringIO()
    lines = Lines(stream, seconds=0.0)
    for text in ("\rsft: 50%", "\rsft: 100%", "\rsft: 100%", "\n"):
        lines.write(text)
    assert stream.getvalue() == "sft: 50%\nsft: 100%\n"


def test_ranks_are_shown_as_if_they_were_here_and_rays_housekeeping_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with without_prefixes():
        print("(RayTrainWorker pid=12, ip=10.0.0.2) loss 3")
        print("(PlacementGroupCleaner pid=12) Failed to query")
        print("(ServerActor pid=7) [vLLM engine 0] ready")
        print("(my own brackets) stay")
    assert capsys.readouterr().out == "loss 3\n[vLLM engine 0] ready\n(my own brackets) stay\n"


def test_lightning_is_told_the_place_that_ray_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.2")
    monkeypatch.setenv("MASTER_PORT", "4321")
    environment = RayEnvironment(Place(world_size=3, rank=2, local_world_size=1, local_rank=0, node_rank=1))
    environment.set_global_rank(1)
    environment.set_world_size(2)
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (3, 2, 0)
    assert (environment.node_rank(), environment.main_address, environment.main_port) == (1, "10.0.0.2", 4321)
    assert environment.creates_processes_externally


def test_data_is_divided_by_all_ranks_also_where_nodes_have_unlike_numbers_of_them() -> None:
    place = Place(world_size=3, rank=2, local_world_size=1, local_rank=0, node_rank=1)
    strategy = HybridDeepSpeedStrategy()
    L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, num_nodes=2, plugins=[RayEnvironment(place)], logger=False
    )
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 3, "rank": 2}

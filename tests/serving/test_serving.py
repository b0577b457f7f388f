"""Roles in processes of their own: real ones, asked over HTTP, that fail, hang, are killed or lose their starter."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from lightning_hybrid.errors import ConfigError, ServerError
from lightning_hybrid.serving import RunningServer, ServerClient, ServerSpec, start_local, start_servers, use_starter

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from lightning_hybrid.serving import ServerClient, ServerSpec, start_servers
servers = start_servers([ServerSpec(f"role {i}", "tests.serving.roles", {}) for i in range(2)])
clients = [ServerClient(server.url, server.token, "role", 20.0) for server in servers]
for client in clients:
    about = client.call("about", variables=[])
    print(about["pid"], about["helper"], flush=True)
time.sleep(600)
"""


def role(what: str = "role", **settings: object) -> ServerSpec:
    return ServerSpec(what, "tests.serving.roles", settings)


def client_of(server: RunningServer, timeout: float = 30.0) -> ServerClient:
    return ServerClient(server.url, server.token, "reward model", timeout)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def all_gone_within(seconds: float, pids: list[int]) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    (running,) = start_local([role()])
    yield running
    running.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[ServerClient]:
    connected = client_of(server)
    yield connected
    connected.close()


def test_numbers_and_texts_come_back_as_they_were(client: ServerClient) -> None:
    values = {"floats": [0.1, 1e-30, float("-inf")], "text": "häßlich 😀", "ids": [[1, 2], []]}
    assert client.call("echo", **values) == values


def test_requests_are_answered_side_by_side(client: ServerClient) -> None:
    client.call("echo")
    began = time.monotonic()
    threads = [threading.Thread(target=client.call, args=("sleep",), kwargs={"seconds": 1.0}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 7.0  # not the eight seconds of one after the other


def test_an_error_of_a_route_is_told_and_the_server_goes_on(client: ServerClient) -> None:
    with pytest.raises(
        ServerError, match=r"(?s)reward model at http://127.* answered /fail with status 500: Key"
    ) as other:
        client.call("fail", kind="other")
    with pytest.raises(ServerError, match="status 400: RewardError: sample 3 is too long") as ours:
        client.call("fail", kind="ours")
    assert (other.value.status, ours.value.status) == (500, 400)
    assert client.call("echo", still=True) == {"still": True}


def test_a_route_that_does_not_exist_is_refused_with_those_that_do(client: ServerClient) -> None:
    with pytest.raises(ServerError, match=r"status 404: there is no route '/score'; there are echo, sleep"):
        client.call("score")


def test_a_wrong_token_is_refused_and_health_needs_none(server: RunningServer) -> None:
    stranger = ServerClient(server.url, "guessed", "reward model", 10.0)
    with pytest.raises(ServerError, match="status 401: the token is missing or wrong") as refused:
        stranger.call("echo")
    stranger.close()
    assert refused.value.status == 401
    assert httpx2.post(f"{server.url}/echo", content=b"{}", trust_env=False).status_code == 401
    assert httpx2.get(f"{server.url}/health", trust_env=False).json() == {"ok": True}


def test_what_is_no_json_object_is_refused(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {server.token}"}
    for content in (b"[1]", b"{", b"\xff"):
        answer = httpx2.post(f"{server.url}/echo", content=content, headers=headers, trust_env=False)
        assert (answer.status_code, "no JSON object" in answer.json()["error"]) == (400, True)


def test_it_listens_on_loopback_only(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    address = f"{int(port):04X}"
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [where for where in listening if where.endswith(f":{address}")] == [f"0100007F:{address}"]


def test_a_server_that_hangs_is_named_when_time_is_up(server: RunningServer) -> None:
    impatient = client_of(server, timeout=0.5)
    with pytest.raises(ServerError, match=r"reward model at .* gave no answer to /sleep within 0.5 seconds") as late:
        impatient.call("sleep", seconds=5.0)
    impatient.close()
    assert late.value.status is None


def test_a_process_is_no_rank_and_sees_the_devices_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    specs = [
        ServerSpec("one", "tests.serving.roles", {}, devices=(1,), environment={"OF_ITS_OWN": "yes"}),
        ServerSpec("none", "tests.serving.roles", {}, devices=()),
    ]
    servers = start_local(specs)
    found = []
    for server in servers:
        client = client_of(server)
        names = ["RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OF_ITS_OWN"]
        found.append(list(client.call("about", variables=names)["variables"].values()))
        client.close()
        server.close()
    assert found == [[None, None, "6", "yes"], [None, None, "", None]]
    with pytest.raises(ConfigError, match=r"one is to have the CUDA devices \[2\], but this process sees 2"):
        start_local([ServerSpec("one", "tests.serving.roles", {}, devices=(2,))])


def test_a_closed_server_leaves_nothing_behind() -> None:
    (server,) = start_local([role()])
    client = client_of(server)
    about = client.call("about", variables=[])
    client.close()
    assert server.exited() is None
    server.close()
    assert all_gone_within(5.0, [about["pid"], about["helper"]])
    server.close()


def test_a_killed_child_is_seen_by_its_callers_and_by_its_starter(capfd: pytest.CaptureFixture[str]) -> None:
    (server,) = start_local([role("the reference")])
    client = client_of(server)
    with pytest.raises(ServerError, match=r"was lost at /end .*its process has ended") as lost:
        client.call("end")
    assert lost.value.status is None
    with pytest.raises(ServerError, match=r"was lost at /echo \(ConnectError"):
        client.call("echo")
    client.close()
    ended = None
    while ended is None:  # its connections close before its process has ended
        ended = server.exited()
    server.close()
    assert "killed by SIGKILL" in ended
    assert "no space left on device" in ended
    assert "[the reference] no space left on device" in capfd.readouterr().err


@pytest.mark.slow
def test_one_that_cannot_start_is_named_and_the_others_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"reward did not start: FileNotFoundError: no model at /nowhere") as refused:
        start_local([role("reference", loads=600.0), role("reward", refuses=True)])
    assert time.monotonic() - began < 300.0  # not the ten minutes of the other one
    assert "raise FileNotFoundError" in str(refused.value)  # the end of its stderr
    with pytest.raises(ConfigError, match=r"(?s)reward did not start: .* exit code 3; .*out of luck"):
        start_local([role("reward", dies=True)])


def test_what_a_library_prints_where_the_address_is_awaited_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "talkative.py").write_text("print('welcome to a library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="reward did not start: what it imports printed b'welcome to a library"):
        start_local([ServerSpec("reward", "talkative", {})])


@pytest.mark.slow
def test_servers_end_by_themselves_when_their_starter_is_killed() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout is not None
    pids = [int(pid) for _ in range(2) for pid in rank.stdout.readline().split()]
    assert len(pids) == 4
    assert all(map(is_alive, pids))
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    rank.stdout.close()
    assert all_gone_within(60.0, pids)  # what they started, too


def test_a_process_that_loads_ends_when_its_starter_is_gone() -> None:
    order = {"settings": {"loads": 600.0}, "token": "t", "host": "127.0.0.1"}
    command = [sys.executable, "-m", "tests.serving.roles"]
    loading = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert loading.stdin is not None
    assert loading.stderr is not None
    loading.stdin.write(json.dumps(order).encode() + b"\n")
    loading.stdin.flush()
    assert b"noise" in loading.stderr.readline()
    loading.stdin.close()
    assert loading.wait(timeout=60) == 128 + signal.SIGTERM
    loading.stderr.close()


def test_a_run_may_have_its_servers_started_by_another(server: RunningServer) -> None:
    asked: list[str] = []

    def elsewhere(specs: object) -> list[RunningServer]:
        asked.extend(spec.what for spec in specs)  # type: ignore[attr-defined]
        return [server]

    use_starter(elsewhere)
    try:
        assert start_servers([role("reward model")]) == [server]
    finally:
        use_starter(None)
    assert asked == ["reward model"]


def test_a_server_at_an_address_that_is_gone_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = ServerClient(url, "token", "vLLM engine 1", 5.0)
    with pytest.raises(ServerError, match=rf"vLLM engine 1 at {url} was lost at /generate"):
        client.call("generate")
    client.close()

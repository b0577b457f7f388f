"""A real vLLM in a process of its own: its weights are those of the last update, also in the middle of a response."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from lightning_hybrid.config import RolloutConfig, VLLMConfig
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import Rollout
from lightning_hybrid.models import Policy, build_policy, load_policy
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.rollout import PromptRequest
from lightning_hybrid.rollout.vllm import SeparateVLLM, VLLMRollout
from lightning_hybrid.rollout.vllm.fleet import MODULE
from lightning_hybrid.rollout.vllm.weights import WeightStream
from tests.vllm.wide_heads import perturbed, write_wide_model

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: see .ci/vllm")
pytestmark = pytest.mark.slow

PROMPTS = [[1, 338, 402], [1, 77], [1, *range(300, 380)]]  # one of more than a block
MIB = 1 << 20


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Policy:
    folder = tmp_path_factory.mktemp("model") / "wide"
    return load_policy(write_wide_model(shared / "models" / "tinystories-656k", folder))


@pytest.fixture(scope="module")
def other(policy: Policy) -> Policy:
    return Policy(perturbed(policy.model, 0.02))


@pytest.fixture(scope="module")
def separate(policy: Policy) -> Iterator[SeparateVLLM]:
    """For all tests here: the last of them ends it by force."""
    made = backend_of(policy, bucket_mib=1)
    yield made
    made.close()


def backend_of(policy: Policy, tokens: int = 12, **changes: Any) -> SeparateVLLM:
    """Nothing ends its responses but their length."""
    vllm = VLLMConfig(colocate=False, kv_cache_gib=0.1, **changes)
    made = SeparateVLLM(RolloutConfig(backend="vllm", max_new_tokens=tokens, vllm=vllm), [], 0)
    made.prepare(policy.model, torch.device("cpu"), torch.float32)
    return made


def of_length(separate: SeparateVLLM, tokens: int) -> None:
    separate.config = separate.config.model_copy(update={"max_new_tokens": tokens})


def requests(*keys: int) -> list[PromptRequest]:
    return [PromptRequest(key, PROMPTS[key % len(PROMPTS)], key, 3) for key in keys]


def in_flight(separate: SeparateVLLM, key: int) -> None:
    """Wait until what was submitted has some tokens: as many as one more request, which is short."""
    longer = separate.config
    of_length(separate, 5)
    separate.submit(requests(key), n=1)
    separate.wait([key], 1)
    separate.config = longer


def gaps(policy: Policy, rollout: Rollout) -> Tensor:
    """Difference of log-probs to the training forward, nats; 0 elsewhere."""
    with torch.no_grad():
        own = policy_logprobs(policy, rollout, 8, 1.0)
    return (own - rollout.sampling_logprobs).abs() * rollout.response_mask


def test_log_probs_are_those_of_the_training_forward_after_each_update(
    policy: Policy, other: Policy, separate: SeparateVLLM
) -> None:
    of_length(separate, 12)
    for each, wrong in ((policy, other), (other, policy), (policy, other)):
        rollout = separate.generate(each.model, PROMPTS, seed=3, n=2)
        assert rollout.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
        assert gaps(each, rollout).max() < 1e-4
        assert gaps(wrong, rollout).max() > 0.1
    alone = separate.generate(policy.model, PROMPTS[1:2], seed=3, indices=[1], n=2)
    assert alone.responses == rollout.responses[2:4]


def test_tokens_on_both_sides_of_a_seam_are_of_the_weights_that_their_version_names(
    policy: Policy, other: Policy, separate: SeparateVLLM
) -> None:
    first = separate.update(policy.model)
    of_length(separate, 300)
    separate.submit(requests(0, 1, 2), n=2)
    in_flight(separate, 3)
    assert separate.update(other.model) == first + 1
    assert set(separate.wait([0, 1, 2], 3)) == {0, 1, 2}
    rollout = separate.take([0, 1, 2], n=2)
    assert rollout.versions is not None
    assert rollout.lengths.tolist() == [300] * 6
    before, after = rollout.versions == first, rollout.versions == first + 1
    assert (before.any(1) & after.any(1)).any(), "no response was in flight"
    assert torch.equal(before | after, rollout.response_mask)
    assert (gaps(policy, rollout) * before).max() < 1e-4
    assert (gaps(other, rollout) * after).max() < 1e-4
    assert (gaps(policy, rollout) * after).max() > 0.1 < (gaps(other, rollout) * before).max()


def test_an_engine_that_is_killed_in_generation_is_started_anew_once(policy: Policy, separate: SeparateVLLM) -> None:
    of_length(separate, 300)
    separate.update(policy.model)
    separate.submit(requests(10, 11, 12), n=2)
    in_flight(separate, 14)
    killed = engine_process()
    killed.kill()
    with pytest.warns(UserWarning, match=r"(?s)vLLM engine 0 at http://.* is lost: .*SIGKILL.*started anew, once"):
        separate.wait([10, 11, 12], 3)
    rollout = separate.take([10, 11, 12], n=2)
    assert rollout.lengths.tolist() == [300] * 6
    assert gaps(policy, rollout).max() < 1e-4
    assert engine_process() != killed
    separate.submit(requests(13), n=2)
    engine_process().kill()
    with pytest.raises(RolloutError, match=r"(?s)vLLM engine 0 at http://.*SIGKILL.*and before it was started anew"):
        separate.wait([13], 1)
    assert separate.crew is not None


def engine_process() -> psutil.Process:
    """The newest of this process."""
    children = [child for child in psutil.Process().children() if MODULE in child.cmdline()]
    return max(children, key=lambda child: child.create_time())


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident(process: int, what: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since :func:`forget_peak`."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def growth(processes: list[int], push: Callable[[], Any]) -> list[int]:
    """Bytes that each process holds at most while something is done, beyond what it holds before."""
    for process in processes:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    before = [resident(process, "VmRSS") for process in processes]
    push()
    return [resident(process, "VmHWM") - held for process, held in zip(processes, before, strict=True)]


@pytest.fixture(scope="module")
def large() -> Policy:
    """154 MiB of weights in 12 layers of 12.8 MiB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 16}
    return build_policy({"model_type": "llama", **sizes, "num_key_value_heads": 16}, 1024)


def test_sending_weights_takes_a_bucket_and_a_layer_on_either_side(large: Policy) -> None:
    separate = backend_of(large, bucket_mib=4)
    separate.update(large.model)
    rank, engine = growth([psutil.Process().pid, engine_process().pid], lambda: separate.update(large.model))
    separate.close()
    weights = WeightStream(large.model).bytes
    print(f"weights {weights / MIB:.0f} MiB, growth of the rank {rank / MIB:.1f}, of the engine {engine / MIB:.1f} MiB")
    assert weights > 150 * MIB
    assert rank < 2 * 4 * MIB  # what is not sharded is sent as it lies
    assert engine < (4 + 3 * 13) * MIB  # a layer as it comes, as vLLM packs it, and what its allocator keeps of them


def test_pushing_weights_inside_a_rank_takes_a_layer(large: Policy, alone_in_group: None) -> None:
    config = RolloutConfig(backend="vllm", max_new_tokens=4, vllm=VLLMConfig(kv_cache_gib=0.1))
    backend = VLLMRollout(config, [2], 0)
    backend.prepare(large.model, torch.device("cpu"), torch.float32)

    def push() -> None:
        assert backend.engine is not None
        with backend.engine.awake(None, WeightStream(large.model)):
            pass

    push()
    (grown,) = growth([psutil.Process().pid], push)
    backend.close()
    print(f"growth of the rank {grown / MIB:.1f} MiB")
    assert grown < 2 * 13 * MIB

"""The decode loop with our attention kernel against the loop without: on a GPU, or with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1", allow_module_level=True)

from lightning_hybrid.containers import attention  # noqa: E402
from lightning_hybrid.generation import SamplingParams  # noqa: E402
from lightning_hybrid.generation import step as step_module  # noqa: E402
from lightning_hybrid.generation import workspace as workspace_module  # noqa: E402
from tests.generation.loops import PaddedSteps, generated, generation  # noqa: E402
from tests.helpers import tiny_policy  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter counts its loops with NumPy arrays.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

MODELS: dict[str, dict[str, Any]] = {
    "llama: grouped queries": {},
    "gemma2: windows and softcap": {
        "model_type": "gemma2",
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
    },
    "bloom: slopes": {"model_type": "bloom", "n_layer": 2, "n_head": 4, "num_key_value_heads": 4},
}
SAMPLING = SamplingParams(6, temperature=0.0)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_kernel_and_plain_attention_generate_the_same(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], lag: int
) -> None:
    policy = tiny_policy(**changes).to("cuda" if CUDA else "cpu")
    monkeypatch.setattr(workspace_module, "graphs_serve", lambda decoder: False)
    monkeypatch.setattr(attention, "kernel_serves", lambda device, dtype: False)
    plain = generated(policy, SAMPLING, slots=5, lag=0)
    used = count_uses(monkeypatch)
    monkeypatch.setattr(attention, "kernel_serves", lambda device, dtype: True)
    with torch.inference_mode():
        made = generation(policy, SAMPLING, slots=5, lag=lag)
        made.steps = PaddedSteps(made.step)  # over free slots too, as captured steps run
        kernel = made.run()
    assert used
    assert kernel.responses == plain.responses
    assert kernel.finish_reasons == plain.finish_reasons
    torch.testing.assert_close(kernel.policy_logprobs, plain.policy_logprobs, rtol=0, atol=2e-5)


def count_uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of attention that steps make from now on."""
    used: list[str] = []
    make = step_module.make_decode

    def noted(*arguments: Any) -> Any:
        made = make(*arguments)
        assert isinstance(made, attention.KernelDecode)
        used.append("kernel")
        return made

    monkeypatch.setattr(step_module, "make_decode", noted)
    return used

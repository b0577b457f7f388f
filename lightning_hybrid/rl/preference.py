"""Preference optimisation without rollouts: losses on the log-probs of whole responses.

Everywhere, ``h = (log pi(y_c|x) - log pi_ref(y_c|x)) - (log pi(y_r|x) - log pi_ref(y_r|x))`` is by how much more the
policy prefers the chosen response than the reference does, in nats. Log-probs of responses are SUMS over their tokens,
as in the papers, with every kind. The reference-free form has zeros for the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.rl.masking import check_batch_time, widen

PREFERENCE_KINDS = ("sigmoid", "hinge", "ipo")


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-prob of each response: the sum over its tokens.

    Args:
        logprobs: Float[B, T], of the tokens.
        mask: Bool[B, T], True on the tokens of the response.

    Returns:
        Float[B]; 0 for a response without tokens.

    Raises:
        ValueError: Wrong shape or mask dtype.
    """
    check_batch_time(mask, logprobs=logprobs)
    return widen(logprobs).masked_fill(~mask, 0.0).sum(1)


def preference_optimization_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of pairs, to be minimised.

    - ``sigmoid``: ``-log sigmoid(beta h)`` (DPO, Rafailov et al. 2023, equation 7). With ``label_smoothing`` e, the
      preference is taken to be wrong with that probability: ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``
      (conservative DPO, Mitchell 2023).
    - ``hinge``: ``max(0, 1 - beta h)`` (SLiC, Zhao et al. 2023, with margin ``1 / beta`` and scaled by beta; against a
      reference as in Liu et al. 2024, "RSO").
    - ``ipo``: ``(h - 1 / (2 beta))^2`` (Azar et al. 2023, equation 17; their tau is ``beta``). ``h`` is of whole
      responses, as there, not of the mean token.

    Args:
        policy_chosen: Float[B], log-probs of the preferred responses under the policy.
        policy_rejected: Float[B], of the others.
        ref_chosen: Float[B], under the reference; zeros for the reference-free form.
        ref_rejected: Float[B], of the others.
        beta: How strongly the policy is held to the reference; above 0.
        kind: One of the above.
        label_smoothing: From 0 up to, not including, 0.5; with ``sigmoid`` only.

    Returns:
        Losses Float[B], and the implicit rewards ``beta * (policy - ref)`` of the chosen and of the rejected responses,
        Float[B] each, detached.

    Raises:
        ValueError: Shapes differ or are not [B], or a setting is out of its range.
    """
    _check_vectors(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    _check_beta(beta)
    _check_smoothing(kind, label_smoothing)
    chosen = widen(policy_chosen) - widen(ref_chosen)
    rejected = widen(policy_rejected) - widen(ref_rejected)
    losses = _losses(chosen - rejected, beta, kind, label_smoothing)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def kto_baseline(
    policy_mismatched: Tensor, ref_mismatched: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """KTO's reference point z0: KL(policy || reference), estimated on prompts with the responses of OTHER prompts.

    ``max(0, mean(log pi(y'|x) - log pi_ref(y'|x)))``, over all ranks (Ethayarajh et al. 2024, section 4.1). It gets no
    gradient.

    Args:
        policy_mismatched: Float[M], log-probs of mismatched responses under the policy.
        ref_mismatched: Float[M], under the reference.
        reduce: Sums a small 1-dim float tensor across data-parallel ranks and returns the sum; it is called exactly
            once. None: this batch alone.

    Returns:
        Float, 0-dim, at least 0, in nats; 0 where there is no mismatched response at all.

    Raises:
        ValueError: Shapes differ or are not [M].
    """
    _check_vectors(policy_mismatched=policy_mismatched, ref_mismatched=ref_mismatched)
    gaps = (widen(policy_mismatched) - widen(ref_mismatched)).detach()
    sums = torch.stack((gaps.sum(), gaps.new_tensor(float(len(gaps)))))
    total, count = (sums if reduce is None else reduce(sums)).unbind()
    return (total / count.clamp(min=1)).clamp(min=0)


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """KTO's losses, to be minimised: one response at a time is known to be desirable or not (Ethayarajh et al. 2024).

    Equation 8 with r = log pi(y|x) - log pi_ref(y|x): ``w (1 - sigmoid(beta (r - z0)))`` for a desirable response and
    ``w (1 - sigmoid(beta (z0 - r)))`` for an undesirable one, w being the weight of its side.

    Args:
        policy: Float[B], log-probs of the responses under the policy.
        ref: Float[B], under the reference; zeros for the reference-free form.
        desirable: Bool[B].
        baseline: z0, see :func:`kto_baseline`; a number, or 0-dim.
        beta: How strongly the policy is held to the reference; above 0.
        desirable_weight: Their lambda_D, at least 0.
        undesirable_weight: Their lambda_U, at least 0.

    Returns:
        Losses Float[B], and the implicit rewards ``beta * r``, Float[B], detached.

    Raises:
        ValueError: Shapes differ or are not [B], ``desirable`` is not boolean, or a setting is out of its range.
    """
    _check_vectors(policy=policy, ref=ref, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable has dtype {desirable.dtype}, allowed is torch.bool: pass desirable == 1")
    _check_beta(beta)
    _check_weight("desirable_weight", desirable_weight)
    _check_weight("undesirable_weight", undesirable_weight)
    ratio = widen(policy) - widen(ref)
    gain = ratio - (baseline.detach() if isinstance(baseline, Tensor) else baseline)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(ratio.dtype)
    # 1 - sigmoid(x) is sigmoid(-x), which does not round to 0 where x is large.
    losses = weights * torch.sigmoid(beta * torch.where(desirable, -gain, gain))
    return losses, beta * ratio.detach()


def _losses(lead: Tensor, beta: float, kind: str, label_smoothing: float) -> Tensor:
    """Float[B] of the leads h, Float[B]."""
    if kind == "hinge":
        return F.relu(1 - beta * lead)
    if kind == "ipo":
        return (lead - 1 / (2 * beta)).square()
    right, wrong = -F.logsigmoid(beta * lead), -F.logsigmoid(-beta * lead)
    return right if label_smoothing == 0 else (1 - label_smoothing) * right + label_smoothing * wrong


def _check_vectors(**tensors: Tensor) -> None:
    first, shape = next((name, tensor.shape) for name, tensor in tensors.items())
    if len(shape) != 1:
        raise ValueError(f"{first} has shape {list(shape)}, allowed is [batch]: one number for each response")
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, allowed is that of {first}, {list(shape)}")


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}, allowed are finite numbers above 0")


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name} is {weight}, allowed are finite numbers from 0 up")


def _check_smoothing(kind: str, label_smoothing: float) -> None:
    if kind not in PREFERENCE_KINDS:
        raise ValueError(f"kind is {kind!r}, allowed are {', '.join(PREFERENCE_KINDS)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, allowed are numbers from 0 to below 0.5: it is the share of "
            "preferences that are taken to be the wrong way round"
        )
    if label_smoothing > 0 and kind != "sigmoid":
        raise ValueError(f"label_smoothing is {label_smoothing} with kind {kind!r}, allowed is 0: only sigmoid has it")

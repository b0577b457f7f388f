"""What scoring and training take beyond what is at rest: the moments at which a pass or a step holds most."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_hybrid.config.ppo import rollout_lacks_old_logprobs
from lightning_hybrid.plan.held import Held, Moment, moment
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.setup import FP32, Setup
from lightning_hybrid.plan.trace import Peak, Size, forward_peak, training_peak
from lightning_hybrid.plan.weights import (
    SCORE,
    TRAIN,
    at_rest,
    bucket_bytes,
    gathered_bytes,
    gathering_bytes,
    owned_gradient_bytes,
    share,
)
from lightning_hybrid.rewards.learned import TEXTS_AT_ONCE


def scoring(setup: Setup, kept: list[Held]) -> Iterator[Moment]:
    """The forward passes that make experience.

    Args:
        setup: of the run.
        kept: by generation until the next one.
    """
    networks, batch = setup.networks, setup.run.data.batch_size
    rows = min(setup.run.algorithm.micro_batch_size, batch)
    if "reward" in networks:
        rest = at_rest(setup, SCORE, {"reward"}) + kept
        yield _forward(setup, networks["reward"], min(TEXTS_AT_ONCE, batch), rest)
    runs = ["actor"] * recomputes(setup) + ["reference", "critic"]
    for role in runs:
        yield _forward(setup, networks[role], rows, at_rest(setup, SCORE, set(runs)) + kept)


def recomputes(setup: Setup) -> bool:
    """Whether the actor's log-probs may be computed again; ``auto`` does so at least once."""
    algorithm = setup.run.algorithm
    return algorithm.old_logprobs != "rollout" or rollout_lacks_old_logprobs(setup.run.rollout) is not None


def training(setup: Setup, kept: list[Held]) -> Iterator[Moment]:
    """An optimizer step's passes and its steps; actor and critic take turns, micro-batch by micro-batch.

    Gradients of both pile up until the actor's engine steps, and then the critic's.

    Args:
        setup: of the run.
        kept: by generation until the next one.
    """
    actor, critic = setup.networks["actor"], setup.networks["critic"]
    rest = at_rest(setup, TRAIN, {"actor", "critic"}) + kept
    later = setup.micro_batches > 1
    yield from _backward(setup, actor, rest + (_kept(setup, critic) if later else []), later)
    yield from _backward(setup, critic, rest + _kept(setup, actor), later)
    yield from _step(setup, actor, rest + _kept(setup, critic))
    yield from _step(setup, critic, rest)


def _forward(setup: Setup, network: Network, rows: int, rest: list[Held]) -> Moment:
    peak = forward_peak(network, _size(setup, network, rows))
    return moment(f"{network.role}'s forward pass", rest, _of_peak(network, peak), _live(setup, network, False))


def _size(setup: Setup, network: Network, rows: int) -> Size:
    if network.scalar:
        return Size(rows, setup.tokens)
    algorithm, asked = setup.run.algorithm, setup.run.rollout.max_new_tokens
    chunk = min(algorithm.logprob_chunk, rows * asked)
    return Size(rows, setup.tokens, asked, chunk, algorithm.entropy_coef > 0)


def _of_peak(network: Network, peak: Peak) -> list[Held]:
    return [
        Held(network.role, "activations", peak.activations),
        Held(network.role, "logits", peak.logits),
        Held(network.role, "gradients", peak.gradients),
    ]


def _live(setup: Setup, network: Network, trains: bool) -> list[Held]:
    """Whole weights while ZeRO-3 runs a model; most is held where the backward pass begins, if there is one."""
    return [
        Held(network.role, "weights", gathered_bytes(setup, network)),
        Held(network.role, "buffers", gathering_bytes(setup, network, trains)),
    ]


def _kept(setup: Setup, network: Network) -> list[Held]:
    """An engine's gradients between its passes, beyond what is always there."""
    if setup.stage == 3:
        return []
    held = [Held(network.role, "gradients", owned_gradient_bytes(setup, network))]
    if setup.stage == 1 and not setup.on_cpu:  # written in the step only
        held.append(Held(network.role, "buffers", bucket_bytes(setup, network)))
    return held


def _backward(setup: Setup, network: Network, rest: list[Held], later: bool) -> Iterator[Moment]:
    """A forward and backward pass and, at stage 2, the reduction of what it gave.

    Args:
        setup: of the run.
        network: which runs.
        rest: what is held beside it.
        later: whether gradients of earlier micro-batches wait already.
    """
    own = _kept(setup, network) if later else []
    peak = training_peak(network, _size(setup, network, setup.micro_batch), _piling_up(setup, network, later))
    bucket = [Held(network.role, "buffers", _bucket_while_running(setup, network, later))]
    name = f"{network.role}'s forward and backward pass"
    yield moment(name, rest, own, bucket, _of_peak(network, peak), _live(setup, network, True))
    if setup.stage == 2:
        yield moment(f"reduction of the {network.role}'s gradients", rest, own, _reduction(setup, network))


def _piling_up(setup: Setup, network: Network, later: bool) -> int:
    """Bytes that new gradients add while a pass goes on.

    Stages 0 and 1 add them to those that wait. From stage 2 on they move into the bucket, which on a CPU takes as much
    memory as is written; ZeRO-3's has all been written before.
    """
    if setup.stage == 3 or (setup.stage < 2 and later):
        return 0
    if setup.stage == 2:
        return bucket_bytes(setup, network) if setup.on_cpu else 0
    return network.numel * network.itemsize


def _bucket_while_running(setup: Setup, network: Network, later: bool) -> int:
    """Bytes of a bucket that a GPU allocates with the first gradient, and that nobody counted before."""
    if setup.on_cpu:
        return 0
    return bucket_bytes(setup, network) if setup.stage == 2 or (setup.stage == 1 and not later) else 0


def _reduction(setup: Setup, network: Network) -> list[Held]:
    """The bucket; and a copy of what is in it while ranks add it up, or then what this rank keeps of it."""
    owned = owned_gradient_bytes(setup, network)
    copy = min(setup.bucket, network.numel) * network.itemsize if setup.ranks > 1 else 0
    return [
        Held(network.role, "buffers", bucket_bytes(setup, network) + max(0, copy - owned)),
        Held(network.role, "gradients", owned),
    ]


def _step(setup: Setup, network: Network, rest: list[Held]) -> Iterator[Moment]:
    """An optimizer step: reduction where it was put off, the fp32 gradient, and what AdamW computes with."""
    role, part, d = network.role, share(setup, network), network.itemsize
    name = f"{role}'s optimizer step"
    if setup.offloads_optimizer:
        yield moment(name, rest, _kept(setup, network))
        return
    if setup.stage < 2:
        copy = min(setup.bucket if setup.stage else 500_000_000, network.numel) * d
        yield moment(f"reduction of the {role}'s gradients", rest, _kept(setup, network), [Held(role, "buffers", copy)])
    if setup.stage == 0:
        largest = max(network.sizes)
        yield moment(name, rest, _kept(setup, network), [Held(role, "buffers", _adam(setup, largest, network.numel))])
        return
    if setup.stage == 3:
        part = min(part, int(setup.zero["sub_group_size"]) + max(network.sizes) // setup.ranks)
    flat = part * (d if d < FP32 else 0)
    gradient = [Held(role, "gradients", part * FP32)]
    own = [Held(role, "gradients", owned_gradient_bytes(setup, network))] if setup.stage < 3 else []
    yield moment(f"the {role}'s gradients in fp32", rest, own, gradient, [Held(role, "buffers", flat)])
    yield moment(name, rest, gradient, [Held(role, "buffers", _adam(setup, part, part))])


def _adam(setup: Setup, largest: int, together: int) -> int:
    """Bytes of AdamW's denominators: on a CPU tensor by tensor, root and quotient; on a GPU all roots at once."""
    return FP32 * (2 * largest if setup.on_cpu else together)

"""What scoring and training take beyond what is at rest: the moments at which a pass or a step holds most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_hybrid.config.sampling import rollout_lacks_old_logprobs
from lightning_hybrid.plan.held import Held, Moment, moment
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.setup import FP32, Setup
from lightning_hybrid.plan.trace import Peak, Size, forward_peak, training_peak
from lightning_hybrid.plan.weights import (
    GENERATE,
    SCORE,
    TRAIN,
    TRAINED,
    at_rest,
    bucket_bytes,
    gathered_bytes,
    gathering_bytes,
    owned_gradient_bytes,
    share,
)


def scoring(setup: Setup, generated: list[Held], tokens: list[Held]) -> Iterator[Moment]:
    """What the reward's models take, and the forward passes that make experience.

    Args:
        setup: of the run.
        generated: what generation leaves behind, unless it sleeps.
        tokens: what is remembered of the responses.
    """
    kept = tokens + ([] if setup.run.strategy.sleep.kv_cache else generated)
    yield moment("between rewards and forward passes", at_rest(setup, SCORE, set()), kept)
    yield from _rewards(setup, kept, tokens + generated)
    rows, networks = min(setup.run.algorithm.micro_batch_size, setup.rows), setup.networks
    base = replace(networks["actor"], adapter=None)
    passes = [("actor", networks["actor"])] * recomputes(setup) + [("actor", base)] * setup.reference_is_actor
    passes += [(name, networks[name]) for name in ("reference", "critic") if name in networks]
    rest = at_rest(setup, SCORE, {name for name, _ in passes}) + kept
    for name, runs in passes:
        yield _forward(setup, networks[name], runs, _size(setup, runs, rows), rest)


def _rewards(setup: Setup, kept: list[Held], generated: list[Held]) -> Iterator[Moment]:
    """Where an engine runs one of them, it is a phase of its own; classifiers alone are run as generation left all."""
    rewards = {name: network for name, network in setup.networks.items() if network.role == "reward"}
    in_engines = {name for name, network in rewards.items() if not network.replicated}
    rest = at_rest(setup, SCORE, in_engines) + kept if in_engines else at_rest(setup, GENERATE, {"actor"}) + generated
    for network in rewards.values():
        yield _forward(setup, network, network, _texts(setup, network), rest)


def _texts(setup: Setup, network: Network) -> Size:
    """What a reward model reads in one pass."""
    return Size(min(network.texts, setup.rows), min(setup.tokens, network.readable or setup.tokens))


def pass_of(setup: Setup, network: Network) -> list[Held]:
    """What a forward pass of a frozen model takes, beyond its weights."""
    rows = min(setup.run.algorithm.micro_batch_size, setup.rows)
    size = _texts(setup, network) if network.role == "reward" else _size(setup, network, rows)
    return _of_peak(network, forward_peak(network, size))


def recomputes(setup: Setup) -> bool:
    """Whether the actor's log-probs may be computed again; ``auto`` does so at least once."""
    algorithm = setup.run.algorithm
    return algorithm.old_logprobs != "rollout" or rollout_lacks_old_logprobs(setup.run.rollout) is not None


def training(setup: Setup, kept: list[Held]) -> Iterator[Moment]:
    """An optimizer step's passes and its steps; actor and critic take turns, micro-batch by micro-batch.

    Gradients of both pile up until the actor's engine steps, and then the critic's. Texts of the PTX loss come after
    all micro-batches of the step.

    Args:
        setup: of the run.
        kept: of generation and of what was made of it.
    """
    actor, critic = setup.networks["actor"], setup.networks.get("critic")
    rest, of_critic = at_rest(setup, TRAIN, TRAINED) + kept, [] if critic is None else _kept(setup, critic)
    later = setup.micro_batches > 1
    size = _size(setup, actor, setup.micro_batch)
    yield from _backward(setup, actor, size, rest + (of_critic if later else []), later)
    if critic is not None:
        yield from _backward(setup, critic, _size(setup, critic, setup.micro_batch), rest + _kept(setup, actor), later)
    if setup.run.algorithm.ptx_coef > 0:
        yield from _backward(setup, actor, _ptx_size(setup), rest + of_critic, True, " over texts of the PTX loss")
    yield from _step(setup, actor, rest + of_critic)
    if critic is not None:
        yield from _step(setup, critic, rest)


def _ptx_size(setup: Setup) -> Size:
    """Every token of a text may be learned but its first."""
    rows, tokens = setup.run.ptx.batch_size, setup.ptx_tokens
    asked = tokens - 1
    return Size(rows, tokens, asked, min(setup.run.algorithm.logprob_chunk, rows * asked))


def _forward(setup: Setup, network: Network, runs: Network, size: Size, rest: list[Held]) -> Moment:
    """A pass of ``runs``, which is ``network`` or what is left of it with adapters off."""
    whose = network.name if runs is network else "reference"
    peak = forward_peak(runs, size)
    live = [] if network.replicated else _live(setup, network, False)
    return moment(f"{whose}'s forward pass", rest, _of_peak(network, peak), live)


def _size(setup: Setup, network: Network, rows: int) -> Size:
    if network.scalar:
        return Size(rows, setup.tokens)
    algorithm, asked = setup.run.algorithm, setup.run.rollout.max_new_tokens
    chunk = min(algorithm.logprob_chunk, rows * asked)
    return Size(rows, setup.tokens, asked, chunk, algorithm.entropy_coef > 0)


def _of_peak(network: Network, peak: Peak) -> list[Held]:
    return [
        Held(network.name, "activations", peak.activations),
        Held(network.name, "logits", peak.logits),
        Held(network.name, "gradients", peak.gradients),
    ]


def _live(setup: Setup, network: Network, trains: bool) -> list[Held]:
    """Whole weights while ZeRO-3 runs a model; most is held where the backward pass begins, if there is one.

    And one weight that is read out of four bits.
    """
    return [
        Held(network.name, "weights", gathered_bytes(setup, network)),
        Held(network.name, "buffers", gathering_bytes(setup, network, trains) + network.unpacked),
    ]


def _kept(setup: Setup, network: Network) -> list[Held]:
    """An engine's gradients between its passes, beyond what is always there."""
    stage = setup.engine(network).stage
    if stage == 3:
        return []
    held = [Held(network.name, "gradients", owned_gradient_bytes(setup, network))]
    if stage == 1 and not setup.on_cpu:  # written in the step only
        held.append(Held(network.name, "buffers", bucket_bytes(setup, network)))
    return held


def _backward(
    setup: Setup, network: Network, size: Size, rest: list[Held], later: bool, of: str = ""
) -> Iterator[Moment]:
    """A forward and backward pass and, at stage 2, the reduction of what it gave.

    Args:
        setup: of the run.
        network: which runs.
        size: of what it runs over.
        rest: what is held beside it.
        later: whether gradients of earlier micro-batches wait already.
        of: what it runs over, where that is no micro-batch of the rollout.
    """
    own = _kept(setup, network) if later else []
    peak = training_peak(network, size, _piling_up(setup, network, later))
    bucket = [Held(network.name, "buffers", _bucket_while_running(setup, network, later))]
    name = f"{network.name}'s forward and backward pass{of}"
    yield moment(name, rest, own, bucket, _of_peak(network, peak), _live(setup, network, True))
    if setup.engine(network).stage == 2:
        yield moment(f"reduction of the {network.name}'s gradients{of}", rest, own, _reduction(setup, network))


def _piling_up(setup: Setup, network: Network, later: bool) -> int:
    """Bytes that new gradients add while a pass goes on.

    Stages 0 and 1 add them to those that wait. From stage 2 on they move into the bucket, which on a CPU takes as much
    memory as is written; ZeRO-3's has all been written before.
    """
    stage = setup.engine(network).stage
    if stage == 3 or (stage < 2 and later):
        return 0
    if stage == 2:
        return bucket_bytes(setup, network) if setup.on_cpu else 0
    return network.trained * network.itemsize


def _bucket_while_running(setup: Setup, network: Network, later: bool) -> int:
    """Bytes of a bucket that a GPU allocates with the first gradient, and that nobody counted before."""
    stage = setup.engine(network).stage
    if setup.on_cpu:
        return 0
    return bucket_bytes(setup, network) if stage == 2 or (stage == 1 and not later) else 0


def _reduction(setup: Setup, network: Network) -> list[Held]:
    """The bucket; and a copy of what is in it while ranks add it up, or then what this rank keeps of it."""
    owned, bucket = owned_gradient_bytes(setup, network), setup.engine(network).bucket
    copy = min(bucket, network.trained) * network.itemsize if setup.ranks > 1 else 0
    return [
        Held(network.name, "buffers", bucket_bytes(setup, network) + max(0, copy - owned)),
        Held(network.name, "gradients", owned),
    ]


def _step(setup: Setup, network: Network, rest: list[Held]) -> Iterator[Moment]:
    """An optimizer step: reduction where it was put off, the fp32 gradient, and what AdamW computes with."""
    role, engine, kept = network.name, setup.engine(network), _kept(setup, network)
    name = f"{role}'s optimizer step"
    if engine.offloads_optimizer:
        yield moment(name, rest, kept)
        return
    if engine.stage < 2:
        copy = min(engine.bucket if engine.stage else 500_000_000, network.trained) * network.itemsize
        yield moment(f"reduction of the {role}'s gradients", rest, kept, [Held(role, "buffers", copy)])
    if engine.stage == 0:
        largest = max(network.trained_sizes)
        yield moment(name, rest, kept, [Held(role, "buffers", _adam(setup, largest, network.trained))])
        return
    yield from _step_of_share(setup, network, rest, name)


def _step_of_share(setup: Setup, network: Network, rest: list[Held], name: str) -> Iterator[Moment]:
    """Stages 1 to 3 step what the rank owns, stage 3 a part of it at a time."""
    role, engine, part, d = network.name, setup.engine(network), share(setup, network), network.itemsize
    if engine.stage == 3:
        part = min(part, int(engine.zero["sub_group_size"]) + max(network.trained_sizes) // setup.ranks)
    flat = part * (d if d < FP32 else 0)
    gradient = [Held(role, "gradients", part * FP32)]
    own = [Held(role, "gradients", owned_gradient_bytes(setup, network))] if engine.stage < 3 else []
    yield moment(f"the {role}'s gradients in fp32", rest, own, gradient, [Held(role, "buffers", flat)])
    yield moment(name, rest, gradient, [Held(role, "buffers", _adam(setup, part, part))])


def _adam(setup: Setup, largest: int, together: int) -> int:
    """Bytes of AdamW's denominators: on a CPU tensor by tensor, root and quotient; on a GPU all roots at once."""
    return FP32 * (2 * largest if setup.on_cpu else together)

"""What engines hold whatever they do: weights, master weights, optimizer states, and the gradients' place.

With P elements that are trained, d bytes each, over W ranks (DeepSpeed 0.19, AdamW, `overlap_comm` off):

=====  ===========  ==================  ==================  =====================
stage  weights      master weights      optimizer states    gradients of a step
=====  ===========  ==================  ==================  =====================
0      P d          none (fp32 only)    8 P                 P d
1      P d          4 P / W             8 P / W             P d
2      P d          4 P / W             8 P / W             d × what the rank owns
3      P d / W      4 P / W             8 P / W             P d / W, always there
=====  ===========  ==================  ==================  =====================

Stages 1 to 3 keep master weights in fp32 too, where they are a second copy. They also reduce gradients through a bucket
of ``reduce_bucket_size`` elements: from the first gradient until the pass (stage 2) or the step (stage 1) ends, and
always at stage 3. A GPU gives a bucket all of its memory; a CPU gives pages when they are written. What is frozen, a
whole model or the weights under an adapter, has weights only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lightning_hybrid.plan.engine import Engine
from lightning_hybrid.plan.held import DEVICE, HOST, Held
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.setup import FP32, Setup

GENERATE, SCORE, TRAIN = "generate", "score", "train"
TRAINED = ("actor", "critic")


def at_rest(setup: Setup, phase: str, runs: Collection[str]) -> list[Held]:
    """What all models hold throughout a phase, or a part of one.

    Args:
        setup: of the run.
        phase: one of the three.
        runs: names of the models whose weights are computed with; others may sleep.
    """
    return [held for network in setup.networks.values() for held in _of_one(setup, network, phase, runs)]


def _of_one(setup: Setup, network: Network, phase: str, runs: Collection[str]) -> Iterator[Held]:
    name, sleep, engine = network.name, setup.run.strategy.sleep, setup.engine(network)
    if network.replicated:
        yield Held(name, "weights", network.numel * network.itemsize)
        return
    trained = name in TRAINED
    asleep = name not in runs and (sleep.weights if trained else sleep.frozen_models) and not setup.on_cpu
    away = engine.offloads_parameters or asleep
    yield Held(name, "weights", weight_bytes(setup, network), HOST if away else DEVICE)
    if engine.stage == 3:
        yield Held(name, "weights", persistent_bytes(setup, network), HOST if asleep else DEVICE)
    if trained:
        yield from _to_train(setup, network, phase)


def _to_train(setup: Setup, network: Network, phase: str) -> Iterator[Held]:
    """What only training needs, and may sleep outside it: on a CPU nothing is gained by moving, only by giving up."""
    name, sleep, engine = network.name, setup.run.strategy.sleep, setup.engine(network)
    part, outside = share(setup, network), phase != TRAIN
    moves = outside and not setup.on_cpu
    yield Held(name, "master weights", master_bytes(setup, network), _place(engine, moves and sleep.master_weights))
    yield Held(name, "optimizer states", _states(setup, network) * part, _place(engine, moves and sleep.optimizer))
    yield from _offload_buffers(setup, network)
    # Gradients in host memory do not sleep.
    if engine.stage == 3 and not (sleep.gradients and outside and not engine.offloads_optimizer):
        yield Held(name, "gradients", part * network.itemsize, _place(engine, False))
        yield Held(name, "buffers", bucket_bytes(setup, network))


def _states(setup: Setup, network: Network) -> int:
    """Bytes for each weight that is stepped: two moments, and of the actor its running average where one is kept."""
    averaged = network.name == "actor" and setup.run.callbacks.ema_decay is not None
    return (3 if averaged else 2) * FP32


def _place(engine: Engine, asleep: bool) -> str:
    return HOST if engine.offloads_optimizer or asleep else DEVICE


def share(setup: Setup, network: Network) -> int:
    """Elements that this rank's optimizer updates."""
    ranks, stage = setup.ranks, setup.engine(network).stage
    if stage == 0:
        return network.trained
    if stage == 3:
        return sum(-(-size // ranks) for size in network.trained_sizes)
    # The flat buffer is aligned to two elements for each rank.
    return -(-network.trained // (2 * ranks)) * 2


def weight_bytes(setup: Setup, network: Network) -> int:
    """Of the weights between passes; what is frozen under an adapter is sharded at stage 3 only, too."""
    stage, sized = setup.engine(network).stage, zip(network.sizes, network.widths, strict=True)
    if stage == 3:
        return int(sum(-(-size // setup.ranks) * width for size, width in sized))
    padding = 0
    if stage > 0 and network.name in TRAINED:
        padding = (share(setup, network) * setup.ranks - network.trained) * network.itemsize
    return int(sum(size * width for size, width in sized)) + padding


def persistent_bytes(setup: Setup, network: Network) -> int:
    """Of small parameters that ZeRO-3 keeps whole; with one rank they are their own shards."""
    if setup.ranks == 1:
        return 0
    limit = int(setup.engine(network).zero["stage3_param_persistence_threshold"])
    return sum(size for size in network.sizes if size < limit) * network.itemsize


def master_bytes(setup: Setup, network: Network) -> int:
    """Of fp32 master weights; stage 0 has none."""
    return 0 if setup.engine(network).stage == 0 else FP32 * share(setup, network)


def bucket_bytes(setup: Setup, network: Network) -> int:
    """Of the buffer that gradients are reduced in."""
    bucket = setup.engine(network).bucket
    return (min(bucket, network.trained) if setup.on_cpu else bucket) * network.itemsize


def owned_gradient_bytes(setup: Setup, network: Network) -> int:
    """Of the gradients that a rank keeps between the passes of a step at stages 0 to 2."""
    engine = setup.engine(network)
    if engine.stage == 2 and engine.offloads_optimizer:
        return 0
    elements = network.trained if engine.stage < 2 else min(network.trained, share(setup, network))
    return elements * network.itemsize


def gathered_bytes(setup: Setup, network: Network) -> int:
    """Of whole weights that exist at once while ZeRO-3 runs a model; with one rank nothing is gathered."""
    engine = setup.engine(network)
    if engine.stage < 3 or (setup.ranks == 1 and not engine.offloads_parameters):
        return 0
    most = int(engine.zero["stage3_max_live_parameters"]) + int(engine.zero["stage3_prefetch_bucket_size"])
    return min(network.numel, max(most, max(network.sizes))) * network.itemsize


def gathering_bytes(setup: Setup, network: Network, all_live: bool) -> int:
    """Of the flat buffer that weights ahead arrive in, to be copied out of it one by one.

    Args:
        setup: of the run.
        network: whose weights.
        all_live: whether weights that ZeRO-3 lets live stay from a forward pass for its backward pass.
    """
    live = gathered_bytes(setup, network)
    if not live or (all_live and live == network.numel * network.itemsize):
        return 0
    return min(network.numel, int(setup.engine(network).zero["stage3_prefetch_bucket_size"])) * network.itemsize


def _offload_buffers(setup: Setup, network: Network) -> Iterator[Held]:
    """Stages 1 and 2 with an offloaded optimizer: gradients and updated weights on their way to and from the host."""
    engine = setup.engine(network)
    if not engine.offloads_optimizer or engine.stage == 3:
        return
    part, largest = share(setup, network), max(network.trained_sizes) * network.itemsize
    yield Held(network.name, "gradients", (FP32 + network.itemsize) * part, HOST)
    yield Held(network.name, "buffers", network.itemsize * part + largest, HOST)
    yield Held(network.name, "buffers", largest)

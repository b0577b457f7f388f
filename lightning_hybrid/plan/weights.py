"""What engines hold whatever they do: weights, master weights, optimizer states, and the gradients' place.

With P elements, d bytes each, over W ranks (DeepSpeed 0.19, AdamW, `overlap_comm` off):

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
always at stage 3. A GPU gives a bucket all of its memory; a CPU gives pages when they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

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
        runs: roles whose weights are computed with; others may sleep.
    """
    return [held for network in setup.networks.values() for held in _of_one(setup, network, phase, runs)]


def _of_one(setup: Setup, network: Network, phase: str, runs: Collection[str]) -> Iterator[Held]:
    role, trained, sleep = network.role, network.role in TRAINED, setup.run.strategy.sleep
    asleep = role not in runs and (sleep.weights if trained else sleep.frozen_models) and not setup.on_cpu
    away = setup.offloads_parameters or asleep
    yield Held(role, "weights", weight_bytes(setup, network, trained), HOST if away else DEVICE)
    if setup.stage == 3:
        yield Held(role, "weights", persistent_bytes(setup, network), HOST if asleep else DEVICE)
    if trained:
        yield from _to_train(setup, network, phase)


def _to_train(setup: Setup, network: Network, phase: str) -> Iterator[Held]:
    """What only training needs, and may sleep outside it: on a CPU nothing is gained by moving, only by giving up."""
    role, sleep, part = network.role, setup.run.strategy.sleep, share(setup, network)
    outside = phase != TRAIN
    moves = outside and not setup.on_cpu
    yield Held(role, "master weights", master_bytes(setup, network), _place(setup, moves and sleep.master_weights))
    yield Held(role, "optimizer states", 2 * FP32 * part, _place(setup, moves and sleep.optimizer))
    yield from _offload_buffers(setup, network)
    # Gradients in host memory do not sleep.
    if setup.stage == 3 and not (sleep.gradients and outside and not setup.offloads_optimizer):
        yield Held(role, "gradients", part * network.itemsize, _place(setup, False))
        yield Held(role, "buffers", bucket_bytes(setup, network))


def _place(setup: Setup, asleep: bool) -> str:
    return HOST if setup.offloads_optimizer or asleep else DEVICE


def share(setup: Setup, network: Network) -> int:
    """Elements that this rank's optimizer updates."""
    ranks = setup.ranks
    if setup.stage == 0:
        return network.numel
    if setup.stage == 3:
        return sum(-(-size // ranks) for size in network.sizes)
    # The flat buffer is aligned to two elements for each rank.
    return -(-network.numel // (2 * ranks)) * 2


def weight_bytes(setup: Setup, network: Network, trained: bool) -> int:
    """Of the weights between passes."""
    if setup.stage == 3:
        return share(setup, network) * network.itemsize
    if setup.stage == 0 or not trained:
        return network.numel * network.itemsize
    return share(setup, network) * setup.ranks * network.itemsize


def persistent_bytes(setup: Setup, network: Network) -> int:
    """Of small parameters that ZeRO-3 keeps whole; with one rank they are their own shards."""
    if setup.ranks == 1:
        return 0
    limit = int(setup.zero["stage3_param_persistence_threshold"])
    return sum(size for size in network.sizes if size < limit) * network.itemsize


def master_bytes(setup: Setup, network: Network) -> int:
    """Of fp32 master weights; stage 0 has none."""
    return 0 if setup.stage == 0 else FP32 * share(setup, network)


def bucket_bytes(setup: Setup, network: Network) -> int:
    """Of the buffer that gradients are reduced in."""
    elements = min(setup.bucket, network.numel) if setup.on_cpu else setup.bucket
    return elements * network.itemsize


def owned_gradient_bytes(setup: Setup, network: Network) -> int:
    """Of the gradients that a rank keeps between the passes of a step at stages 0 to 2."""
    if setup.stage == 2 and setup.offloads_optimizer:
        return 0
    elements = network.numel if setup.stage < 2 else min(network.numel, share(setup, network))
    return elements * network.itemsize


def gathered_bytes(setup: Setup, network: Network) -> int:
    """Of whole weights that exist at once while ZeRO-3 runs a model; with one rank nothing is gathered."""
    if setup.stage < 3 or (setup.ranks == 1 and not setup.offloads_parameters):
        return 0
    most = int(setup.zero["stage3_max_live_parameters"]) + int(setup.zero["stage3_prefetch_bucket_size"])
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
    return min(network.numel, int(setup.zero["stage3_prefetch_bucket_size"])) * network.itemsize


def _offload_buffers(setup: Setup, network: Network) -> Iterator[Held]:
    """Stages 1 and 2 with an offloaded optimizer: gradients and updated weights on their way to and from the host."""
    if not setup.offloads_optimizer or setup.stage == 3:
        return
    part = share(setup, network)
    yield Held(network.role, "gradients", (FP32 + network.itemsize) * part, HOST)
    yield Held(network.role, "buffers", (network.itemsize * part) + max(network.sizes) * network.itemsize, HOST)
    yield Held(network.role, "buffers", max(network.sizes) * network.itemsize)

"""The decode loop: prompts wait, rows live in slots, each pass draws one token for every live row.

The host launches passes; what they drew it hears as :class:`Report`. On a GPU it hears of a pass while the next one is
running already, so that neither waits for the other; until the host has heard that a row ended, the row is frozen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from lightning_hybrid.containers import Decoder, Prefill, rounded
from lightning_hybrid.containers.transfer import sent
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation.assemble import assemble
from lightning_hybrid.generation.carrier import Rollout
from lightning_hybrid.generation.draw import stream_key
from lightning_hybrid.generation.reports import Report, Reports
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.slots import ALIVE, EOS, LENGTH, NOT_FINITE
from lightning_hybrid.generation.stopping import StopTexts
from lightning_hybrid.generation.workspace import Workspace

# Prompt tokens read in one pass, padded to the longest as attention has them, unless a single prompt has more.
PREFILL_TOKENS = 8192
REASONS = {ALIVE: "", EOS: "eos", LENGTH: "length"}


@dataclass
class Response:
    """One response being generated.

    Attributes:
        prompt: index of its prompt.
        row: of the results.
        key: its random stream.
        length: tokens of the prompt and those drawn of which the host has heard.
        tokens: drawn so far; kept only where stop texts are looked for.
        reason: why it ended; empty while it lives.
    """

    prompt: int
    row: int
    key: int
    length: int
    tokens: list[int] = field(default_factory=list)
    reason: str = ""


class Generation:
    """One call of the loop.

    Args:
        decoder: runs the model.
        workspace: the KV cache and what else is kept between calls.
        prompts: token ids, none empty.
        sampling: how to draw.
        eos_ids: tokens that end a response.
        seed: of all random streams.
        indices: each prompt's index in its random stream's name; by default its position.
        stop: texts that end a response.
        any_rank: whether any rank still has work, asked before every pass; a rank without rows then takes part in
            fetching weights. By default this rank decides alone.
        lag: passes that the host may launch before it hears of an earlier one. What is drawn does not depend on it.
            By default 1 on a GPU and 0 on a CPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        workspace: Workspace,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        eos_ids: Sequence[int],
        seed: int,
        indices: Sequence[int] | None = None,
        stop: StopTexts | None = None,
        any_rank: Callable[[bool], bool] = bool,
        lag: int | None = None,
    ) -> None:
        self.decoder, self.sampling, self.prompts = decoder, sampling, prompts
        self.stop = stop or StopTexts((), None)
        self.any_rank = any_rank
        names = range(len(prompts)) if indices is None else indices
        self.responses = [
            Response(i, i * sampling.n + sample, stream_key(seed, name, sample), len(prompt))
            for i, (prompt, name) in enumerate(zip(prompts, names, strict=True))
            for sample in range(sampling.n)
        ]
        self.waiting = deque(self.responses)
        self.live: list[Response] = []
        self.cache, self.slots = workspace.cache, workspace.slots
        self.slots.clear()
        self.steps = workspace.steps(decoder, sampling, eos_ids, len(self.responses))
        self.step = self.steps.step
        self.lag = int(decoder.device.type == "cuda") if lag is None else lag
        self.reports = Reports(self.slots, self.lag)

    def run(self) -> Rollout:
        """Generate all responses.

        Raises:
            RolloutError: if the model's numbers stop being finite, naming prompt, step and layer.
        """
        with _current(self.decoder.device):
            while self.any_rank(bool(self.live or self.waiting)):
                launched = self._launch()
                self._settle(self.lag if launched else 0)
            return assemble(self.prompts, self.responses, self.step.results, self.sampling)

    def _launch(self) -> bool:
        """Launch the next pass, if only for other ranks' sake; whether it draws tokens here."""
        if self._may_admit():
            self._admit()
        elif self._may_advance():
            self._advance()
        else:
            self.decoder.idle()
            return False
        return True

    # ---- reading prompts ---------------------------------------------------------------------------------------------

    def _may_admit(self) -> bool:
        """Whether to read prompts now: reading a few together costs hardly more than one."""
        free = self.cache.slots - len(self.live)
        return bool(self.waiting) and (not self.live or free >= min(len(self.waiting), max(1, self.cache.slots // 8)))

    def _admit(self) -> None:
        """Read the prompts that fit, once each, and draw the first token of their responses."""
        groups = list(self._next_groups())
        begin = len(self.live)
        firsts = [begin + sum(len(group) for group in groups[:i]) for i in range(len(groups))]
        device = self.decoder.device
        lengths = [len(self.prompts[group[0].prompt]) for group in groups]
        prefill = Prefill(self.cache, self.decoder.scores, sent(firsts, device), lengths)
        tokens = [token for group in groups for token in self.prompts[group[0].prompt]]
        hidden = self.decoder(sent(tokens, device), prefill.positions, prefill)
        logits = self.decoder.logits(hidden[prefill.last])
        self._share(firsts, groups, max(lengths))
        fresh = [response for group in groups for response in group]
        self.live += fresh
        self.slots.assign(begin, [r.length for r in fresh], [r.key for r in fresh], [r.row for r in fresh])
        self._remember_prompts(begin, fresh)
        repeats = sent([len(group) for group in groups], device)
        self.step.draw(logits.repeat_interleave(repeats, 0, output_size=len(fresh)), begin, len(self.live))
        self.reports.send(begin, fresh)

    def _next_groups(self) -> Iterator[list[Response]]:
        """Waiting responses, those of one prompt together, as far as slots and the size of a pass allow."""
        free, count, longest = self.cache.slots - len(self.live), 0, 0
        while self.waiting and free > 0:
            prompt = self.waiting[0].prompt
            longest = max(longest, rounded(len(self.prompts[prompt])))
            count += 1
            if count > 1 and count * longest > PREFILL_TOKENS:
                return
            group: list[Response] = []
            while self.waiting and self.waiting[0].prompt == prompt and len(group) < free:
                group.append(self.waiting.popleft())
            free -= len(group)
            yield group

    def _share(self, firsts: list[int], groups: list[list[Response]], upto: int) -> None:
        """Give the cache of a prompt's first response to its others."""
        pairs = [(first, first + i) for first, group in zip(firsts, groups, strict=True) for i in range(1, len(group))]
        if pairs:
            source, target = sent(pairs, self.decoder.device).unbind(1)
            self.cache.copy(source, target, upto)

    def _remember_prompts(self, begin: int, fresh: list[Response]) -> None:
        seen = self.step.seen
        if seen is None:
            return
        seen[begin : begin + len(fresh)] = False
        pairs = [(slot, token) for slot, r in enumerate(fresh, begin) for token in self.prompts[r.prompt]]
        slots, tokens = sent(pairs, self.decoder.device).unbind(1)
        seen[slots, tokens] = True

    # ---- drawing tokens ----------------------------------------------------------------------------------------------

    def _may_advance(self) -> bool:
        """Whether a row may still be alive: all have drawn their last token where those on the way complete them."""
        coming, most = len(self.reports), self.sampling.max_new_tokens
        return any(r.length + coming - len(self.prompts[r.prompt]) < most for r in self.live)

    def _advance(self) -> None:
        """One more token for every live row."""
        self.steps(len(self.live), [self._bound(response) for response in self.live])
        self.reports.send(0, list(self.live))

    def _bound(self, response: Response) -> int:
        """At most so many tokens of a live response are in the cache; the one drawn last is not there yet."""
        return min(response.length - 1 + len(self.reports), self.cache.capacity - 1)

    # ---- ending responses --------------------------------------------------------------------------------------------

    def _settle(self, behind: int) -> None:
        """Hear of passes until no more than ``behind`` are unheard of, and clear the slots of responses that ended."""
        for report in self.reports.due(behind):
            self._hear(report)
            kept = [slot for slot, response in enumerate(self.live) if not response.reason]
            if len(kept) < len(self.live):
                self._close_gaps(kept)

    def _hear(self, report: Report) -> None:
        """Note what a pass drew, except for responses that had ended before it."""
        tokens, statuses = report.read()
        grown = []
        for response, token, status in zip(report.responses, tokens, statuses, strict=True):
            if response.reason:
                continue
            response.length += 1
            if status == NOT_FINITE:
                self._refuse_infinite(response)
            response.reason = REASONS[status]
            grown.append(response)
            if self.stop:
                response.tokens.append(token)
        if self.stop:
            self._look_for_stop_texts(grown)

    def _look_for_stop_texts(self, grown: list[Response]) -> None:
        going = [r for r in grown if not r.reason and len(r.tokens) >= self.sampling.min_new_tokens]
        ended = self.stop.completed([response.tokens for response in going]) if going else []
        for response, done in zip(going, ended, strict=True):
            response.reason = "stop" if done else ""

    def _close_gaps(self, kept: list[int]) -> None:
        """Move rows from the end into the slots of ended ones, and free what is behind them."""
        count = len(kept)
        gaps = [slot for slot in range(count) if self.live[slot].reason]
        movers = [slot for slot in kept if slot >= count]
        if movers:
            self._move(movers, gaps)
        for source, target in zip(movers, gaps, strict=True):
            self.live[target] = self.live[source]
        self.slots.free(count, len(self.live))
        del self.live[count:]

    def _move(self, movers: list[int], gaps: list[int]) -> None:
        source, target = sent([movers, gaps], self.decoder.device).unbind()
        self.cache.copy(source, target, max(self._bound(self.live[slot]) for slot in movers))
        self.slots.move(source, target)
        if self.step.seen is not None:
            self.step.seen[target] = self.step.seen[source]

    def _refuse_infinite(self, response: Response) -> None:
        """Raise, with the step and, where this rank can tell alone, the layer in which the numbers went wrong."""
        prompt = self.prompts[response.prompt]
        step = response.length - len(prompt)
        where = "a layer unknown"
        if self.decoder.weights.steady and self.decoder.shard.size == 1:
            where = self._first_infinite([*prompt, *self.step.results.tokens[response.row, : step - 1].tolist()])
        raise RolloutError(
            f"the logits of prompt {response.prompt} are not finite at step {step}; the numbers first go wrong in "
            f"{where}: look at the last update (learning rate, loss scale), or load an earlier checkpoint"
        )

    def _first_infinite(self, tokens: list[int]) -> str:
        """Where numbers stop being finite, found by reading ``tokens`` again with every layer checked."""
        probe, device = self.decoder.cache(1, len(tokens)), self.decoder.device
        prefill = Prefill(probe, self.decoder.scores, sent([0], device), [len(tokens)])
        try:
            self.decoder(sent(tokens, device), prefill.positions, prefill, check=True)
        except FloatingPointError as error:
            return str(error)
        return "the head"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: kernels and streams without a device named are its."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

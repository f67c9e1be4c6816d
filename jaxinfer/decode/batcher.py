"""`Batcher`: continuous batching. Requests come and go while others run, each as if it were alone.

with lm.batcher(slots=8) as batcher:
    tickets = [batcher.submit(prompt, max_new_tokens=64) for prompt in prompts]
    answers = [ticket.result() for ticket in tickets]
"""

import atexit
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType

from jaxinfer.arguments import flag, of_kind, whole
from jaxinfer.cache.policy import Policy
from jaxinfer.decode.model import Model, Prompt
from jaxinfer.decode.options import Options
from jaxinfer.decode.request import Request
from jaxinfer.decode.sampling import GREEDY, Sampler
from jaxinfer.decode.scheduler import Scheduler
from jaxinfer.decode.servable import Servable
from jaxinfer.decode.slot_requests import Constraint, Extras
from jaxinfer.decode.ticket import Ticket


class QueueFull(RuntimeError):
    """All slots are taken and as many requests wait as may."""


class Batcher:
    """A model that serves many requests at once; `LM.batcher` makes one.

    A thread of its own owns the device. Requests wait in a queue, first come, first served; one
    whose turn it is gets a slot, and with it the memory of `context` tokens. Its prompt is read in
    pieces between the steps of the others, if its policy takes prompts in pieces (`reads_whole`),
    and its row joins the compiled loop. Every request gets the tokens and log-probabilities that
    `LM.generate` would give it alone, but for what the rounding of other shapes changes.

    `close`, or the end of a `with` block, waits for what was submitted.
    """

    def __init__(self, serving: Servable, queue: int = 64):
        self._serving, self._queue = serving, whole("queue", queue, least=0)
        self._scheduler = Scheduler(serving)
        self._changed = threading.Condition()
        self._device = threading.Lock()  # who holds it may use the device
        self._tickets: list[Ticket] = []  # that have not ended when last looked at
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="jaxinfer-batcher", daemon=True)
        self._thread.start()
        atexit.register(_close, weakref.ref(self))

    def submit(
        self,
        prompt: Prompt,
        *,
        sampler: Sampler = GREEDY,
        max_new_tokens: int = 64,
        seed: int = 0,
        sample: int = 0,
        stop: str | Sequence[str] | None = (),
        ignore_eos: bool = False,
        min_tokens: int = 0,
        top_logprobs: int = 0,
        prompt_log_probs: bool = False,
        constraint: Constraint | None = None,
        prefix_scope: str | None = "",
    ) -> Ticket:
        """Asks for the continuation of a prompt.

        Args:
          prompt: a text or a list of token ids.
          sampler, max_new_tokens, seed, stop, ignore_eos: as in `LM.generate`; a `logit_bias` names
            `jaxinfer.decode.slot_requests.BIASES` tokens at most, and `STOPS` special tokens end a
            text beside the model's own.
          sample: which of several samples of a seed this is, from 0, as `samples` numbers them.
          min_tokens: tokens before which the text draws no stop token.
          top_logprobs: how many of the likeliest tokens to list at each place, up to 20.
          prompt_log_probs: keep the log-probabilities of the prompt's tokens.
          constraint: what the text must follow token by token, such as a grammar. While it runs all
            rows stop behind every step.
          prefix_scope: requests of one scope share what was read of prompts that begin alike
            (`prefix_bytes` of `LM.batcher`); None shares nothing.

        Returns:
          Its ticket, to iterate over, await or cancel.

        Raises:
          ValueError: an option is wrong, or prompt and answer do not fit into a slot.
          QueueFull: too many requests wait.
          RuntimeError: the batcher is closed.
        """
        if max_new_tokens is None:
            raise ValueError("max_new_tokens=None never ends; a batcher needs a number")
        model = self._serving.model
        of_kind("sampler", sampler, Sampler, "a Sampler")
        opts = Options(
            sampler=sampler,
            max_new_tokens=whole("max_new_tokens", max_new_tokens),
            seed=seed,
            stop=stop,
            ignore_eos=flag("ignore_eos", ignore_eos),
        )
        extras = Extras(
            min_tokens=min_tokens,
            top_logprobs=top_logprobs,
            prompt_log_probs=prompt_log_probs,
            sample=sample,
            constraint=constraint,
            prefix_scope=prefix_scope,
        )
        request = Request(model, model.encode(prompt), opts, extras)
        self._serving.check_room(request)
        return self._put(request)

    def warmup(self) -> float:
        """Compiles all programs that requests may need, so that none of them waits for it.

        Returns:
          The seconds that it took.
        """
        start = time.perf_counter()
        with self._device:
            self._serving.warm()
        return time.perf_counter() - start

    @property
    def model(self) -> Model:
        """The model that it serves."""
        return self._serving.model

    @property
    def policy(self) -> Policy:
        """How the caches of its rows keep tokens."""
        return self._serving.policy

    @property
    def slots(self) -> int:
        """Requests that run at once, at most."""
        return self._serving.slots

    @property
    def queue(self) -> int:
        """Requests that wait, at most."""
        return self._queue

    @property
    def context(self) -> int:
        """Tokens of a request, prompt and answer together, at most."""
        return self._serving.context

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of the slots that there are now."""
        return self._scheduler.batch.slots * self._serving.row_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of what stays of texts that were read and made (`prefix_bytes` of `LM.batcher`)."""
        return self._serving.prefix_bytes

    @property
    def reads_whole(self) -> bool:
        """Whether the policy reads a prompt at once (up to 8,192 tokens), as its paper does, so
        that running texts wait for it."""
        return self._serving.policy.prompt == "whole"

    @property
    def programs(self) -> dict[str, int]:
        """Compiled programs of the model by name; requests add none after `warmup`."""
        return self._serving.programs

    @property
    def fingerprint(self) -> str:
        """A short hash of the model's configuration and weights."""
        return self._serving.fingerprint

    @property
    def running(self) -> int:
        """Requests that have a slot, or whose prompt is read."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    def close(self, *, cancel: bool = False) -> None:
        """Ends the batcher, when all that was submitted has ended.

        Args:
          cancel: end that at once.
        """
        with self._changed:
            self._closing = True
            if cancel:
                for ticket in self._tickets:
                    ticket.cancel()
            self._changed.notify_all()
        self._thread.join()
        self._serving.close()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=error is not None)

    def _put(self, request: Request) -> Ticket:
        with self._changed:
            if self._closing:
                raise RuntimeError("this batcher is closed; make another one")
            self._tickets = [ticket for ticket in self._tickets if not ticket.done]
            most = self._serving.slots + self._queue
            if len(self._tickets) >= most:
                raise QueueFull(
                    f"{self._serving.slots} requests run and {self._queue} wait; try again later, "
                    "or make a batcher with more slots or a longer queue"
                )
            self._tickets.append(request.ticket)
            self._scheduler.waiting.append(request)
            self._changed.notify_all()
        return request.ticket

    def _serve(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or not scheduler.idle)
                if scheduler.idle:
                    return
            try:
                with self._device:
                    scheduler.turn()
            except Exception as error:  # nothing that a request does; nobody may wait for ever
                scheduler.abandon(error)


def _close(batcher: "weakref.ref[Batcher]") -> None:
    """At the end of the process, whose threads must not be in the middle of a step."""
    found = batcher()
    if found is not None:
        found.close(cancel=True)

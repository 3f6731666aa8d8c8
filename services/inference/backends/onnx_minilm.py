"""Embeddings with ONNX Runtime: BERT-like encoders, mean pooling, unit length."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from services.inference.domain import Embeddings
from services.runtime.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray


_CHARACTERS_A_TOKEN = 3.5
_BATCH_TOKENS = 1024
"""Padded tokens of one computation: more no longer fits a core's cache and is slower a text."""
_OLDEST_TURN = 4
"""One computation in so many is the oldest text's, whoever asked."""
_REACH = 256
"""Texts looked at for a batch of like lengths."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A text, and the other texts of its request that still wait."""

    text: str
    tokens: int
    request: list[_Waiting]
    background: bool
    done: asyncio.Future[tuple[NDArray[np.float32], int, bool]]


class OnnxEmbedder:
    """An encoder whose batches are filled across callers; open it with `async with`.

    Each lane is a thread that takes what waits and computes it on one core; while it computes, the next batch
    gathers. There is no timer to tune. A question is not kept waiting by a pile of documents: the smallest
    request goes first, background ones last, except for every fourth batch, which is the oldest text's.
    """

    def __init__(
        self,
        files: Callable[[], tuple[Path, Path]],
        *,
        context_tokens: int,
        batch: int,
        queue: int,
        threads: int,
    ) -> None:
        """Set it up; the model is loaded by the first text.

        Args:
            files: Gives the paths of model and tokenizer; may raise FailedPreconditionError.
            context_tokens: Longer texts are cut.
            batch: Most texts computed at once.
            queue: Texts that may wait.
            threads: Computations at once, each on one core.
        """
        self._files = files
        self._context_tokens = context_tokens
        self._batch = batch
        self._queue = queue
        self._waiting: list[_Waiting] = []
        self._turn = 0
        self._wake = asyncio.Condition()
        self._threads = ThreadPoolExecutor(threads, "embed")
        self._lanes = threads
        self._loading = threading.Lock()
        self._session: Any = None
        self._own = threading.local()  # a tokenizer belongs to one thread
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Start taking texts."""
        self._tasks = [
            asyncio.create_task(self._work(), name=f"embedder-{lane}") for lane in range(self._lanes)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; what waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self._waiting:
            entry.done.cancel()
        self._threads.shutdown(wait=True)

    async def load(self) -> None:
        """Load the model now rather than with the first text."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._loaded)

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> Embeddings:
        """See Embedder."""
        self._files()  # a missing model is told at once, not after a wait
        if len(self._waiting) + len(texts) > self._queue:
            raise ResourceExhaustedError(
                f"{len(self._waiting)} texts wait to be embedded", reason="EMBED_QUEUE_FULL", retry_after_s=1
            )
        loop = asyncio.get_running_loop()
        request: list[_Waiting] = []
        for text in texts:
            request.append(_Waiting(text, self._tokens(text), request, background, loop.create_future()))
        entries = list(request)
        self._waiting += entries
        async with self._wake:
            self._wake.notify(len(entries))
        try:
            results = await asyncio.gather(*(entry.done for entry in entries))
        finally:
            for entry in entries:
                entry.done.cancel()  # a caller that went away leaves no work behind
        return Embeddings(
            vectors=np.stack([vector for vector, _, _ in results]),
            tokens=[tokens for _, tokens, _ in results],
            truncated=[position for position, (_, _, cut) in enumerate(results) if cut],
        )

    def _tokens(self, text: str) -> int:
        """About how many tokens a text has."""
        return min(self._context_tokens, int(len(text) / _CHARACTERS_A_TOKEN) + 2)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._wake:
                await self._wake.wait_for(lambda: self._waiting)
            batch = self._next_batch()
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(
                    self._threads, self._compute, [entry.text for entry in batch]
                )
            except Exception as error:  # noqa: BLE001 - each caller gets it
                for entry in batch:
                    if not entry.done.done():
                        entry.done.set_exception(error)
                continue
            for entry, result in zip(batch, results, strict=True):
                if not entry.done.done():
                    entry.done.set_result(result)

    def _next_batch(self) -> list[_Waiting]:
        """Take the text whose turn it is and, from those that wait longest, the nearest to it in length.

        Equal lengths waste no padding. Whose turn it is: see the class.
        """
        self._waiting = [entry for entry in self._waiting if not entry.done.done()]
        if not self._waiting:
            return []
        self._turn += 1
        first, beside = self._waiting[0], self._waiting
        urgent = [entry for entry in self._waiting if not entry.background]
        if urgent and self._turn % _OLDEST_TURN:
            first, beside = min(urgent, key=lambda entry: len(entry.request)), urgent
        window = sorted({*beside[:_REACH], *first.request}, key=lambda entry: entry.tokens)
        low = high = window.index(first)
        while high - low + 1 < min(self._batch, len(window)):
            # Grow to the side where the next length is nearer.
            below = first.tokens - window[low - 1].tokens if low else math.inf
            above = window[high + 1].tokens - first.tokens if high + 1 < len(window) else math.inf
            longest = window[high + (above < below)].tokens
            if longest * (high - low + 2) > _BATCH_TOKENS:
                break
            low, high = (low, high + 1) if above < below else (low - 1, high)
        batch = window[low : high + 1]
        for entry in batch:
            entry.request.remove(entry)
        taken = set(batch)
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        return batch

    def _loaded(self) -> tuple[Any, Any]:
        """The session, shared, and this thread's tokenizer."""
        with self._loading:
            if self._session is None:
                self._session = self._load_session()
        tokenizer = getattr(self._own, "tokenizer", None)
        if tokenizer is None:
            from tokenizers import Tokenizer  # noqa: PLC0415 - heavy, and only needed once there is a text

            _, tokens = self._files()
            tokenizer = self._own.tokenizer = Tokenizer.from_file(str(tokens))
            tokenizer.no_padding()
            # One more than fits: a text of exactly the context is told from a longer one.
            tokenizer.enable_truncation(self._context_tokens + 1)
        return self._session, tokenizer

    def _load_session(self) -> Any:
        import onnxruntime  # noqa: PLC0415 - heavy, and only needed once there is a text

        model, _ = self._files()
        options = onnxruntime.SessionOptions()
        # A computation on one core needs no waiting for another; lanes fill the cores.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def _compute(self, texts: list[str]) -> list[tuple[NDArray[np.float32], int, bool]]:
        session, tokenizer = self._loaded()
        encodings = tokenizer.encode_batch_fast(texts)
        limit = self._context_tokens
        lengths = [min(len(encoding.ids), limit) for encoding in encodings]
        shape = (len(texts), max(lengths))
        ids = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
            ids[row, :length] = encoding.ids[:length]
            ids[row, length - 1] = encoding.ids[-1]  # the end marker stays when the text is cut
            mask[row, :length] = 1
        (hidden,) = session.run(
            None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}
        )
        weights = mask[:, :, None].astype(np.float32)
        pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
        pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return [
            (pooled[row].astype(np.float32), lengths[row], len(encoding.ids) > limit)
            for row, encoding in enumerate(encodings)
        ]

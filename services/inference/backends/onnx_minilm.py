"""Embeddings with ONNX Runtime: BERT-like encoders, mean pooling, unit length."""

from __future__ import annotations

import asyncio
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


@dataclass(slots=True)
class _Waiting:
    text: str
    done: asyncio.Future[tuple[NDArray[np.float32], int, bool]]


class OnnxEmbedder:
    """An encoder whose batches are filled across callers; open it with `async with`.

    One task takes what waits and computes it in a thread of its own; while it computes, the next batch
    gathers. There is no timer to tune.
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
            batch: Texts computed at once.
            queue: Texts that may wait.
            threads: Threads of one computation.
        """
        self._files = files
        self._context_tokens = context_tokens
        self._batch = batch
        self._queue = queue
        self._threads = threads
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "embed")  # the tokenizer belongs to one thread
        self._model: tuple[Any, Any] | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start taking texts."""
        self._task = asyncio.create_task(self._work(), name="embedder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; what waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for entry in self._waiting:
            entry.done.cancel()
        self._thread.shutdown(wait=True)

    async def load(self) -> None:
        """Load the model now rather than with the first text."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._loaded)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See Embedder."""
        self._files()  # a missing model is told at once, not after a wait
        if len(self._waiting) + len(texts) > self._queue:
            raise ResourceExhaustedError(
                f"{len(self._waiting)} texts wait to be embedded", reason="EMBED_QUEUE_FULL", retry_after_s=1
            )
        loop = asyncio.get_running_loop()
        entries = [_Waiting(text, loop.create_future()) for text in texts]
        self._waiting += entries
        self._wake.set()
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

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._next_batch()
                if not batch:
                    continue
                try:
                    results = await loop.run_in_executor(
                        self._thread, self._compute, [entry.text for entry in batch]
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
        """Take the oldest text and, from the next few batches' worth, those nearest to it in length.

        Equal lengths waste no padding, and the oldest goes first, so that nobody starves.
        """
        reach = 8 * self._batch
        window = [entry for entry in self._waiting[:reach] if not entry.done.done()]
        rest = self._waiting[reach:]
        if not window:
            self._waiting = rest
            return []
        oldest = window[0]
        window.sort(key=lambda entry: len(entry.text))
        place = next(number for number, entry in enumerate(window) if entry is oldest)
        start = max(0, min(place - self._batch // 2, len(window) - self._batch))
        batch = window[start : start + self._batch]
        taken = {id(entry) for entry in batch}
        kept = [entry for entry in self._waiting[:reach] if id(entry) not in taken]
        self._waiting = [entry for entry in kept if not entry.done.done()] + rest
        return batch

    def _loaded(self) -> tuple[Any, Any]:
        if self._model is None:
            import onnxruntime  # noqa: PLC0415 - heavy, and only needed once there is a text
            from tokenizers import Tokenizer  # noqa: PLC0415 - the same

            model, tokens = self._files()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            # Idle threads that spin steal the cores from the other services.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            tokenizer = Tokenizer.from_file(str(tokens))
            tokenizer.no_padding()
            # One more than fits: a text of exactly the context is told from a longer one.
            tokenizer.enable_truncation(self._context_tokens + 1)
            self._model = (session, tokenizer)
        return self._model

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

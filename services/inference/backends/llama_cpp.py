"""Chat with llama.cpp inside the process."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import structlog

from services.inference.domain import Delta, Finish
from services.runtime.errors import InvalidArgumentError, PlexusError, ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from services.inference.domain import ChatOptions, Turn

log = structlog.get_logger(__name__)

_CONTEXT_ERROR = "exceed_context_size_error"


class LlamaCppChat:
    """A GGUF model, loaded by its first conversation; one conversation at a time, a bounded number waits."""

    def __init__(self, file: Callable[[], Path], *, context_tokens: int, queue: int, threads: int) -> None:
        """Set it up.

        Args:
            file: Gives the model's path; may raise FailedPreconditionError.
            context_tokens: Longest conversation with its answer.
            queue: Conversations that may wait.
            threads: Threads of a generation.
        """
        self._file = file
        self._context_tokens = context_tokens
        self._queue = queue
        self._threads = threads
        self._thread = ThreadPoolExecutor(1, "chat")
        self._server: Any = None
        self._pending = 0

    def close(self) -> None:
        """Wait for the generation in progress, which its closed iterator has told to stop."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._server = None

    async def chat(self, turns: Sequence[Turn], options: ChatOptions) -> AsyncIterator[Delta]:
        """See ChatModel."""
        path = self._file()
        if self._pending > self._queue:
            raise ResourceExhaustedError(
                f"{self._pending} conversations wait", reason="CHAT_QUEUE_FULL", retry_after_s=2
            )
        request = {
            "messages": [{"role": turn.role.value, "content": turn.content} for turn in turns],
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_tokens,
            "stop": list(options.stop),
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if options.seed is None else {"seed": options.seed}),
        }
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        stopped = threading.Event()

        def receive(chunk: str | dict[str, Any]) -> bool:
            if not stopped.is_set():
                loop.call_soon_threadsafe(
                    chunks.put_nowait, json.loads(chunk) if isinstance(chunk, str) else chunk
                )
            return stopped.is_set()  # true ends the generation

        def generate() -> None:
            if not stopped.is_set():
                self._loaded(path).handle_chat_completions(json.dumps(request), receive)

        self._pending += 1
        work = loop.run_in_executor(self._thread, generate)
        work.add_done_callback(lambda _work: chunks.put_nowait(None))
        try:
            finish = Finish.STOP
            usage: dict[str, int] = {}
            while (chunk := await chunks.get()) is not None:
                _check(chunk)
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    if choice.get("finish_reason") == "length":
                        finish = Finish.LENGTH
                    text = choice["delta"].get("content")
                    if text:
                        yield Delta(text)
            work.result()
            yield Delta(
                finish=finish,
                input_tokens=usage.get("prompt_tokens", 0),
                output_tokens=usage.get("completion_tokens", 0),
            )
        finally:
            stopped.set()
            self._pending -= 1

    def _loaded(self, path: Path) -> Any:
        if self._server is None:
            import xllamacpp  # noqa: PLC0415 - heavy, and only needed for a conversation

            params = xllamacpp.CommonParams()
            params.model.path = str(path)
            params.n_ctx = self._context_tokens
            params.n_parallel = 1
            params.n_gpu_layers = 0
            params.cpuparams.n_threads = self._threads
            params.cpuparams_batch.n_threads = self._threads
            params.warmup = False
            params.cache_ram_mib = 0
            params.verbosity = -1
            # The library listens on a loopback port that nothing here uses: nobody shall know its key.
            params.ui = False
            params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = False
            params.api_keys = [secrets.token_urlsafe(32)]
            self._server = xllamacpp.Server(params)
            log.info("model_loaded", path=path.parent.name)
        return self._server


def _check(chunk: dict[str, Any]) -> None:
    error = chunk.get("error")
    if error is None:
        return
    if error.get("type") == _CONTEXT_ERROR:
        raise InvalidArgumentError(
            f"the conversation has {error.get('n_prompt_tokens')} tokens, the context {error.get('n_ctx')}",
            field="messages",
            reason="CONTEXT_EXCEEDED",
        )
    raise PlexusError("the model failed", reason="GENERATION_FAILED")

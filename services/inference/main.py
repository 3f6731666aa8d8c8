"""Composition of the inference service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plexus.inference.v1 import inference_pb2_grpc
from services.inference.catalogue import Catalogue
from services.inference.config import InferenceConfig
from services.inference.faces.openai import OpenAIFace
from services.inference.models import MANIFEST, ModelStore
from services.inference.servicer import InferenceServicer
from services.runtime.service import Service

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from services.runtime.service import ServiceRuntime


async def compose(runtime: ServiceRuntime, stack: AsyncExitStack) -> None:
    """Set up the models; each is loaded by its first use."""
    from services.inference.backends.llama_cpp import LlamaCppChat  # noqa: PLC0415 - after the fork
    from services.inference.backends.onnx_minilm import OnnxEmbedder  # noqa: PLC0415 - after the fork

    config = runtime.config(InferenceConfig)
    store = ModelStore(runtime.state_dir / "models")
    minilm = await stack.enter_async_context(
        OnnxEmbedder(
            lambda: (store.path("minilm", "model.onnx"), store.path("minilm", "tokenizer.json")),
            context_tokens=MANIFEST["minilm"].context_tokens,
            batch=config.embed_batch,
            queue=config.embed_queue,
            threads=config.embed_threads,
        )
    )
    smollm2 = LlamaCppChat(
        lambda: store.path("smollm2", "model.gguf"),
        context_tokens=min(config.chat_context_tokens, MANIFEST["smollm2"].context_tokens),
        queue=config.chat_queue,
        threads=config.chat_threads,
    )
    stack.callback(smollm2.close)
    catalogue = Catalogue(
        specs=MANIFEST,
        embedders={"minilm": minilm},
        chats={"smollm2": smollm2},
        available=store.available,
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(catalogue, OpenAIFace(catalogue)), runtime.server
    )


SERVICE = Service(
    name="inference",
    compose=compose,
    proto_services=("plexus.inference.v1.InferenceService",),
    stateless=True,  # models are only read
)

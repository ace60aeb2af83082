"""Generates the Python of the wire contract beside its .proto files: `python proto/generate.py [OUT]`.

The result is committed, so that nobody needs a protobuf compiler to install Sightline; `tests/shared/test_proto.py`
generates it again and compares. The compiler is the one inside grpcio-tools, the stubs are mypy-protobuf's, both at
the versions of the lock file.
"""

import shutil
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Writes `sightline/v1/*_pb2*.py[i]` under `out`. Raises RuntimeError if the compiler refuses the contract."""
    plugins = []
    for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
        path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
        if path is None:
            raise RuntimeError(f"{name} must be installed (mypy-protobuf), it was not found")
        plugins.append(f"--plugin={name}={path}")
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("sightline/v1/*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        *plugins,
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out={out}",
        f"--mypy_grpc_out={out}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("the protobuf compiler refused the contract")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)

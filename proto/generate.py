"""Compile proto/*.proto into the stubs that are committed beside them.

python -m proto.generate           write the stubs
python -m proto.generate --check   exit 1 if the committed stubs differ from what the compiler makes
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def compile_protos(output_dir: Path) -> list[Path]:
    """Compile as if from the repository root; returns the stubs. RuntimeError when protoc fails."""
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path) for path in (_ROOT / "proto").glob("*.proto"))
    well_known_types = Path(grpc_tools.__file__).parent / "_proto"
    includes = [f"-I{_ROOT}", f"-I{well_known_types}"]
    outputs = [f"--{kind}={output_dir}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    status = protoc.main(["protoc", *includes, *outputs, *sources])
    if status != 0:
        raise RuntimeError(f"protoc exited with {status}")
    return sorted(path.relative_to(output_dir) for path in (output_dir / "proto").glob("*_pb2*.py*"))


def stale_stubs() -> list[Path]:
    """Committed stubs that are missing, extra, or not what the compiler makes now."""
    with tempfile.TemporaryDirectory() as directory:
        fresh_root = Path(directory)
        fresh = {path: (fresh_root / path).read_bytes() for path in compile_protos(fresh_root)}
    committed = {path.relative_to(_ROOT): path.read_bytes() for path in (_ROOT / "proto").glob("*_pb2*.py*")}
    return sorted(path for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        compile_protos(_ROOT)
        return 0
    stale = stale_stubs()
    for path in stale:
        sys.stderr.write(f"{path} does not match its .proto file; run `make proto`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

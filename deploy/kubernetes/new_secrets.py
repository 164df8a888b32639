"""Makes the secrets of an overlay.

    python deploy/kubernetes/new_secrets.py deploy/kubernetes/overlays/cpu-laptop

Writes OVERLAY/secrets/, readable by you only and ignored by git; kustomize builds the Secrets from it. Run
again with --replace, then apply again, to change all of them: names change with the content, so pods follow.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path


def secret_files(redis_url: str | None) -> dict[str, str]:
    """File name -> content. `redis_url`: of a Redis of your own; None: the one in the base."""
    password = secrets.token_urlsafe(32)
    return {
        "redis-url": redis_url or f"redis://:{password}@baton-redis:6379/0",
        "redis-auth.conf": f"requirepass {password}\n",
        "admin-key": secrets.token_urlsafe(32),
    }


def write_secrets(overlay: Path, redis_url: str | None) -> Path:
    directory = overlay / "secrets"
    directory.mkdir(mode=0o700, exist_ok=True)
    for name, content in secret_files(redis_url).items():
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(content)
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overlay", type=Path, help="directory with a kustomization.yaml")
    parser.add_argument("--redis-url-file", type=Path, help="file with the URL of your own Redis")
    parser.add_argument("--replace", action="store_true", help="overwrite what is there")
    arguments = parser.parse_args()
    if not (arguments.overlay / "kustomization.yaml").is_file():
        sys.stderr.write(f"{arguments.overlay}: no kustomization.yaml in it\n")
        return 2
    if (arguments.overlay / "secrets" / "redis-url").exists() and not arguments.replace:
        sys.stderr.write(f"{arguments.overlay}/secrets is there already; --replace makes new ones\n")
        return 1
    url_file: Path | None = arguments.redis_url_file
    directory = write_secrets(arguments.overlay, url_file.read_text().strip() if url_file else None)
    sys.stdout.write(f"wrote {directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

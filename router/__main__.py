"""python -m router [--print-settings]: serve the OpenAI API. Settings are BATON_ROUTER_* variables."""

from __future__ import annotations

import argparse
import sys

import uvloop

from router.app import build
from router.model_dir import ModelDirError
from router.server import serve
from router.settings import PREFIX, load_router_settings
from servicekit.descriptors import reserve_descriptors
from servicekit.garbage import exempt_from_garbage_search
from servicekit.logging import configure_logging
from servicekit.settings import SettingsError, describe_settings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--print-settings", action="store_true", help="print the settings in effect and exit")
    arguments = parser.parse_args()
    try:
        settings = load_router_settings()
        if arguments.print_settings:
            sys.stdout.write(describe_settings(settings, PREFIX) + "\n")
            return 0
        configure_logging(settings.log_format, settings.log_level, service="router")
        app = build(settings)
    except (SettingsError, ModelDirError, ValueError) as error:
        sys.stderr.write(f"router: {error}\n")
        return 2
    reserve_descriptors()
    exempt_from_garbage_search()
    uvloop.run(serve(app))
    return 0


if __name__ == "__main__":
    sys.exit(main())

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """Of the installed distribution; "0" in a source tree that was never installed."""
    try:
        return installed_version("baton-serve")
    except PackageNotFoundError:
        return "0"

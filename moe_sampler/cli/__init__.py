"""The `moe-sampler` command; `root` puts it together."""

import sys
from typing import TYPE_CHECKING

from .._lazy import lazy_names
from .imports import end_with_command, without_collecting

if TYPE_CHECKING:
    from .root import app

# Other packages' commands use what is beside `root`, and `root` uses them.
_NAMES = {"root": ("app",)}

__all__ = ["app", "main"]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)


def main() -> None:
    """Run the command. Ctrl-C ends it with one word and exit code 130 from here on, imports included."""
    end_with_command()
    try:
        with without_collecting():
            from .root import app, end_with_signals

        end_with_signals()
        app(prog_name="moe-sampler")
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        # Between two commands' own code it is typer that is interrupted, and it says nothing.
        if not isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise
        _interrupted()


def _interrupted() -> None:
    sys.stderr.write("interrupted\n")
    sys.exit(130)

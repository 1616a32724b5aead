"""The command ``moesaic``. Ctrl-C while its modules are loaded ends in one line as well."""

from __future__ import annotations

import sys


def main() -> None:
    """Load and run the command line."""
    try:
        from moesaic.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()

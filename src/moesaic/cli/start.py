"""The command ``moesaic``. Ctrl-C while its modules are loaded ends in one line as well."""

from __future__ import annotations

import sys

from moesaic.cli.heap import keep_freed_pages


def main() -> None:
    """Load and run the command line."""
    keep_freed_pages()
    try:
        from moesaic.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    run()

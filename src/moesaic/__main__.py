"""``python -m moesaic``."""

from moesaic.cli.main import main

main()

"""``python -m moesaic``."""

from moesaic.cli.start import main

main()

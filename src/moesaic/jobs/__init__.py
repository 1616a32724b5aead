"""The whole jobs behind the command line's verbs and the public functions."""

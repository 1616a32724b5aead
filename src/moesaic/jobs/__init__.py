"""The whole jobs that the command line's verbs and the public functions stand for: convert, plan, verify, undo, demo."""

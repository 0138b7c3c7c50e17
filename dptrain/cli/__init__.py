"""The command line: parse, call a composition root, print, set the exit code."""

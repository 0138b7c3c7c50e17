"""The benchmarks: each a run of the command line."""

"""Training as a service: jobs taken over gRPC, queued, run by ``dptrain run``, watched, kept.

It meets training only at the run directory.
"""

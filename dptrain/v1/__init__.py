"""The wire's messages and services, generated from protos/dptrain/v1/ by ``python protos/generate.py``."""

"""Distributed data-parallel training on CPUs with the same bits for any number of workers."""

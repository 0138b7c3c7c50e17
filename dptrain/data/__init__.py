"""The data: sources, checks, encoding, splits and batches.

``prepare`` (one process of a node) does everything that is expensive and returns a plan of plain data; every process
opens the plan with ``dataset.open_dataset`` and reads its rows through ``batches``.
"""

"""Optimizers that update a segment of the flat vector, and the schedules of their learning rate."""

from dptrain.optim.optimizer import SGD, Adam, Optimizer, make_optimizer, worth_compiling
from dptrain.optim.schedule import Schedule, make_schedule

__all__ = ["SGD", "Adam", "Optimizer", "Schedule", "make_optimizer", "make_schedule", "worth_compiling"]

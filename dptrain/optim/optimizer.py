"""Optimizers: element by element, from the old state to the new one, over any segment of the flat vector."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dptrain.job import spec
from dptrain.layout import Array


class Optimizer(ABC):
    """One update rule. ``slots`` names the vectors of state it keeps beside the weights.

    Elements don't meet, so the bits are the same however a caller cuts the vector.
    """

    slots: tuple[str, ...] = ()

    @abstractmethod
    def rates(self, scale: float, lr: float, count: int) -> tuple[float, ...]:
        """The numbers of update ``count`` (from 1) that every element shares; ``gradient * scale`` is the mean."""

    @abstractmethod
    def stretch(
        self,
        w: Array,
        g: Array,
        old: Sequence[Array],
        new_w: Array,
        new: Sequence[Array],
        rates: tuple[float, ...],
        t: Array,
        u: Array,
    ) -> None:
        """Read w, g and old, write new_w and new, which lie elsewhere; t and u are scratch of the same length."""


class SGD(Optimizer):
    """v' = momentum v + g; w' = w - lr v', or with Nesterov w' = w - lr (g + momentum v').

    Weight decay goes into the gradient g.
    """

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.slots = ("momentum",) if momentum else ()

    def rates(self, scale: float, lr: float, count: int) -> tuple[float, ...]:
        """See Optimizer."""
        return scale, lr

    def stretch(
        self,
        w: Array,
        g: Array,
        old: Sequence[Array],
        new_w: Array,
        new: Sequence[Array],
        rates: tuple[float, ...],
        t: Array,
        u: Array,
    ) -> None:
        """See Optimizer."""
        scale, lr = rates
        mean = u if self.nesterov or not self.momentum else new[0]
        np.multiply(g, scale, out=mean)
        if self.weight_decay:
            np.multiply(w, self.weight_decay, out=t)
            np.add(mean, t, out=mean)
        direction = mean
        if self.momentum:
            np.multiply(old[0], self.momentum, out=t)
            np.add(mean, t, out=new[0])
            direction = new[0]
            if self.nesterov:
                np.multiply(new[0], self.momentum, out=t)
                np.add(mean, t, out=u)
                direction = u
        np.multiply(direction, lr, out=t)
        np.subtract(w, t, out=new_w)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015); ``decoupled`` makes it AdamW (Loshchilov and Hutter, 2019).

    Weight decay goes into the gradient, or with AdamW straight into the weights, times lr.
    """

    slots = ("m", "v")

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled

    def rates(self, scale: float, lr: float, count: int) -> tuple[float, ...]:
        """See Optimizer."""
        first = 1.0 - power(self.beta1, count)
        second = 1.0 - power(self.beta2, count)
        return scale, lr / first, float(np.sqrt(second)), 1.0 - lr * self.weight_decay

    def stretch(
        self,
        w: Array,
        g: Array,
        old: Sequence[Array],
        new_w: Array,
        new: Sequence[Array],
        rates: tuple[float, ...],
        t: Array,
        u: Array,
    ) -> None:
        """See Optimizer."""
        scale, step, root, shrink = rates
        m, v = new
        np.multiply(g, scale, out=t)
        if self.weight_decay and not self.decoupled:
            np.multiply(w, self.weight_decay, out=u)
            np.add(t, u, out=t)
        np.multiply(old[0], self.beta1, out=m)
        np.multiply(t, 1.0 - self.beta1, out=u)
        np.add(m, u, out=m)
        np.multiply(t, t, out=t)
        np.multiply(t, 1.0 - self.beta2, out=t)
        np.multiply(old[1], self.beta2, out=v)
        np.add(v, t, out=v)
        np.sqrt(v, out=t)
        np.divide(t, root, out=t)
        np.add(t, self.eps, out=t)
        np.divide(m, t, out=t)
        np.multiply(t, step, out=t)
        if self.weight_decay and self.decoupled:
            np.multiply(w, shrink, out=u)
            w = u
        np.subtract(w, t, out=new_w)


def power(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring: the same float on every machine, which pow() does not promise."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


COMPILED_FROM = 1 << 17
"""Parameters from which compiled updates are worth the time that loading numba takes."""


def worth_compiling(wanted: str, parameters: int) -> bool:
    """Whether updates will be compiled by numba: ``wanted`` is "auto", it is installed, the model large enough."""
    found = importlib.util.find_spec("numba") if wanted == "auto" and parameters >= COMPILED_FROM else None
    # Any folder of that name can be found, but has no origin.
    return found is not None and found.origin is not None


def make_optimizer(settings: spec.Optimizer, *, compiled: bool = False) -> Optimizer:
    """The job's optimizer, without its schedule and clipping; ``compiled`` by numba, the bits are the same."""
    sgd: type[SGD] = SGD
    adam: type[Adam] = Adam
    if compiled:
        from dptrain.optim.compiled import CompiledAdam, CompiledSGD

        sgd, adam = CompiledSGD, CompiledAdam
    if settings.type == "sgd":
        return sgd(settings.momentum, settings.nesterov, settings.weight_decay)
    return adam(
        settings.beta1,
        settings.beta2,
        settings.eps,
        settings.weight_decay,
        decoupled=settings.type == "adamw",
    )

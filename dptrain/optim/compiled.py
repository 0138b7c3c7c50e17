"""Updates in one pass over memory instead of several, compiled by numba (extra ``compiled``); the bits are numpy's.

Every element goes through the operations of optimizer.py in their order, each rounded by itself: nothing is fused or
reassociated. What is compiled is kept in numba's cache.
"""

from collections.abc import Sequence

import numba
import numpy as np

from dptrain.layout import Array
from dptrain.optim.optimizer import SGD, Adam

_compiled = numba.njit(cache=True, error_model="numpy", fastmath=False)


class CompiledSGD(SGD):
    """SGD, one pass."""

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
        number = w.dtype.type
        scale, lr = rates
        if self.momentum:
            _sgd_momentum(
                w,
                g,
                old[0],
                new_w,
                new[0],
                number(scale),
                number(lr),
                number(self.momentum),
                number(self.weight_decay),
                self.nesterov,
            )
        else:
            _sgd(w, g, new_w, number(scale), number(lr), number(self.weight_decay))


class CompiledAdam(Adam):
    """Adam and AdamW, one pass."""

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
        number = w.dtype.type
        scale, step, root, shrink = rates
        _adam(
            w,
            g,
            old[0],
            old[1],
            new_w,
            new[0],
            new[1],
            number(scale),
            number(step),
            number(root),
            number(self.beta1),
            number(1.0 - self.beta1),
            number(self.beta2),
            number(1.0 - self.beta2),
            number(self.eps),
            number(0.0 if self.decoupled else self.weight_decay),
            number(shrink if self.decoupled and self.weight_decay else 1.0),
        )


@_compiled
def _sgd(w, g, new_w, scale, lr, decay):  # type: ignore[no-untyped-def]  # numba finds the types
    for i in range(w.size):
        mean = g[i] * scale
        if decay != 0:
            mean = mean + w[i] * decay
        new_w[i] = w[i] - mean * lr


@_compiled
def _sgd_momentum(w, g, v, new_w, new_v, scale, lr, momentum, decay, nesterov):  # type: ignore[no-untyped-def]
    for i in range(w.size):
        mean = g[i] * scale
        if decay != 0:
            mean = mean + w[i] * decay
        velocity = mean + v[i] * momentum
        new_v[i] = velocity
        direction = mean + velocity * momentum if nesterov else velocity
        new_w[i] = w[i] - direction * lr


@_compiled
def _adam(  # type: ignore[no-untyped-def]
    w, g, m, v, new_w, new_m, new_v, scale, step, root, beta1, rest1, beta2, rest2, eps, decay, shrink
):
    for i in range(w.size):
        mean = g[i] * scale
        if decay != 0:
            mean = mean + w[i] * decay
        first = m[i] * beta1 + mean * rest1
        second = v[i] * beta2 + mean * mean * rest2
        new_m[i] = first
        new_v[i] = second
        change = first / (np.sqrt(second) / root + eps) * step
        if shrink != 1:
            new_w[i] = w[i] * shrink - change
        else:
            new_w[i] = w[i] - change

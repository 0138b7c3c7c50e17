"""Two models, trained here and by PyTorch: same start, same batches, 100 steps of momentum SGD in float64."""

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.nn.chain import build_chain
from dptrain.nn.layer import Pass, Workspace
from dptrain.nn.loss import make_loss
from dptrain.optim import make_optimizer
from dptrain.random import Purpose, stream

from .torch_side import ChannelsLast, images, ours, relative, torch

nn = torch.nn
STEPS, ROWS, LR, MOMENTUM = 100, 16, 0.05, 0.9

MLP = (
    [spec.Linear(units=64), spec.Relu(), spec.Linear(units=32), spec.Tanh(), spec.Linear(units=10)],
    (40,),
    lambda: nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
)
CNN = (
    [
        spec.Conv2d(channels=32),
        spec.Relu(),
        spec.MaxPool2d(),
        spec.Conv2d(channels=64),
        spec.Relu(),
        spec.MaxPool2d(),
        spec.Flatten(),
        spec.Linear(units=128),
        spec.Relu(),
        spec.Linear(units=10),
    ],
    (28, 28, 1),
    lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        ChannelsLast(),
        nn.Linear(1600, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ),
)


class Gradient:
    """A sink for the gradients of the one shard."""

    def __init__(self, layout):
        self.vector = np.zeros((1, layout.size))
        self._tensors = layout.views(self.vector)

    def open(self, name):
        return self._tensors[name]

    def close(self, name):
        pass


def trained_here(layers, shape, start, batches, momentum=MOMENTUM):
    chain = build_chain(layers, shape, np.float64)
    loss = make_loss(spec.Loss(), "classes", 10, 1)
    optimizer = make_optimizer(spec.Optimizer(momentum=momentum))
    sides = [(start.copy(), [np.zeros_like(start)]), (start.copy(), [np.zeros_like(start)])]
    workspace, rows, sink = Workspace(), np.ones((1, ROWS)), Gradient(chain.layout)
    losses = []
    for step, (x, y) in enumerate(batches):
        (w, slots), (new_w, new_slots) = sides
        run = Pass(training=True, seed=0, step=step, shards=[0], rows=rows, counts=[ROWS], workspace=workspace)
        z, backward = chain.forward(chain.layout.views(w), x[None], run)
        sums = loss(z, y[None], rows, workspace, "loss")
        backward(sums.dz, sink)
        losses.append(float(sums.loss[0] / sums.weight[0]))
        rates = optimizer.rates(1 / float(sums.weight[0]), LR, step + 1)
        t, u = np.empty((2, len(w)))
        optimizer.stretch(w, sink.vector[0], slots, new_w, new_slots, rates, t, u)
        sides.reverse()
    return sides[0][0], losses


def trained_there(net, layers, shape, batches):
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        inputs = images(x) if len(shape) == 3 else torch.from_numpy(x)
        loss = nn.functional.cross_entropy(net(inputs), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def vector_of(net):
    return np.concatenate([ours(p).ravel() for p in net.parameters()])


@pytest.mark.parametrize(("layers", "shape", "make"), [MLP, CNN], ids=["mlp", "cnn"])
def test_a_hundred_steps_agree(layers, shape, make):
    torch.manual_seed(3)
    net = make().double()
    rng = stream(1, Purpose.PROBE)
    teacher = rng.standard_normal((int(np.prod(shape)), 10))
    x = rng.standard_normal((STEPS, ROWS, *shape))
    y = (x.reshape(STEPS, ROWS, -1) @ teacher).argmax(axis=-1)
    start = vector_of(net)
    batches = list(zip(x, y, strict=True))
    here, losses = trained_here(layers, shape, start, batches)
    losses_there = trained_there(net, layers, shape, batches)
    there = vector_of(net)
    assert relative(here, there) < 1e-9
    assert relative(losses, losses_there) < 1e-9
    assert relative(start, there) > 1e-2
    other, _ = trained_here(layers, shape, start, batches, momentum=MOMENTUM + 1e-6)
    assert relative(other, there) > 1e-9

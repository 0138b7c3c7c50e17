"""Every layer, loss and optimizer once against PyTorch, in float64."""

import numpy as np
import pytest

from dptrain.job import spec
from dptrain.nn.chain import build_chain
from dptrain.nn.layer import Pass, Workspace
from dptrain.nn.loss import make_loss
from dptrain.optim import make_optimizer
from dptrain.random import Purpose, stream

from .torch_side import ChannelsLast, images, ours, relative, rows_of, torch

nn = torch.nn
ROWS = 6


class Gradients:
    def __init__(self, layout):
        self.tensors = layout.views(np.full((1, layout.size), np.nan))

    def open(self, name):
        return self.tensors[name]

    def close(self, name):
        pass


class OverLastAxis(nn.Module):
    """PyTorch's batch norm over the last axis."""

    def __init__(self, channels, **options):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, **options)

    def forward(self, x):
        return self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


IMAGE, FLAT, SEQUENCE = (9, 8, 5), (7,), (4, 6)
LAYERS = {
    "linear": (spec.Linear(units=3), FLAT, lambda: nn.Linear(7, 3)),
    "linear over a sequence": (spec.Linear(units=3), SEQUENCE, lambda: nn.Linear(6, 3)),
    "conv2d": (spec.Conv2d(channels=4), IMAGE, lambda: nn.Conv2d(5, 4, 3)),
    "conv2d strided": (
        spec.Conv2d(channels=4, kernel=4, stride=3, padding=2, bias=False),
        IMAGE,
        lambda: nn.Conv2d(5, 4, 4, stride=3, padding=2, bias=False),
    ),
    "conv2d same": (
        spec.Conv2d(channels=4, kernel=4, padding="same"),
        (9, 8, 2),
        lambda: nn.Conv2d(2, 4, 4, padding="same"),
    ),
    "max_pool2d": (spec.MaxPool2d(), IMAGE, lambda: nn.MaxPool2d(2)),
    "max_pool2d overlapping": (spec.MaxPool2d(kernel=3, stride=2), IMAGE, lambda: nn.MaxPool2d(3, 2)),
    "avg_pool2d": (spec.AvgPool2d(kernel=3), IMAGE, lambda: nn.AvgPool2d(3)),
    "avg_pool2d overlapping": (spec.AvgPool2d(kernel=3, stride=1), IMAGE, lambda: nn.AvgPool2d(3, 1)),
    "flatten": (spec.Flatten(), IMAGE, ChannelsLast),
    "relu": (spec.Relu(), FLAT, nn.ReLU),
    "leaky_relu": (spec.LeakyRelu(slope=0.1), FLAT, lambda: nn.LeakyReLU(0.1)),
    "gelu": (spec.Gelu(), FLAT, lambda: nn.GELU(approximate="tanh")),
    "tanh": (spec.Tanh(), FLAT, nn.Tanh),
    "sigmoid": (spec.Sigmoid(), FLAT, nn.Sigmoid),
    "batch_norm": (spec.BatchNorm(), FLAT, lambda: nn.BatchNorm1d(7)),
    "batch_norm of images": (spec.BatchNorm(eps=1e-2), IMAGE, lambda: nn.BatchNorm2d(5, eps=1e-2)),
    "batch_norm of sequences": (spec.BatchNorm(), SEQUENCE, lambda: OverLastAxis(6)),
    "layer_norm": (spec.LayerNorm(eps=1e-3), SEQUENCE, lambda: nn.LayerNorm(6, eps=1e-3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree(name):
    config, shape, make = LAYERS[name]
    rng = stream(1, Purpose.PROBE)
    torch.manual_seed(1)
    there = make().double()
    if "norm" in name:
        for p in there.parameters():
            nn.init.uniform_(p, -2.0, 2.0)
    chain = build_chain([config], shape, np.float64)
    vector = np.zeros(chain.layout.size)
    chain.initialise(vector, 0)
    layer = chain._steps[0].layer
    tensors = {full.rsplit(".", 1)[1]: view for full, view in chain.layout.views(vector).items()}
    own = [name for name, _ in layer.parameters]
    for one, p in zip(own, there.parameters(), strict=True):
        tensors[one][...] = ours(p)
    x = rng.standard_normal((ROWS, *shape))
    dy = rng.standard_normal((ROWS, *chain.output_shape))
    y, backward = layer.forward(tensors, x[None], make_run(training=True))
    y = y.copy()
    grads = {one: np.full((1, *values.shape), np.nan) for one, values in tensors.items()}
    dx = backward(dy[None], grads, True)
    x_there = (images(x) if len(shape) == 3 else torch.from_numpy(x)).requires_grad_()
    y_there = there(x_there)
    y_there.backward(images(dy) if y_there.ndim == 4 else torch.from_numpy(dy))
    assert relative(y[0], rows_of(y_there)) < 1e-12
    assert relative(dx[0], rows_of(x_there.grad)) < 1e-11
    for one, p in zip(own, there.parameters(), strict=True):
        assert relative(grads[one][0], ours(p.grad)) < 1e-11, one
    if "batch" in name:
        check_running(there, layer, grads, tensors, x)


def make_run(*, training):
    rows = np.ones((1, ROWS))
    return Pass(training=training, seed=0, step=0, shards=[0], rows=rows, counts=[ROWS], workspace=Workspace())


def check_running(there, layer, grads, tensors, x):
    norm = there.norm if isinstance(there, OverLastAxis) else there
    for name, _, momentum in layer.buffers:
        tensors[name][...] = (1 - momentum) * tensors[name] + momentum * grads[name][0] / ROWS
        assert relative(tensors[name], getattr(norm, name).numpy()) < 1e-12
    there.eval()
    y, _ = layer.forward(tensors, x[None], make_run(training=False))
    y_there = there(images(x) if x.ndim == 4 else torch.from_numpy(x))
    assert relative(y[0], rows_of(y_there)) < 1e-12


def test_embedding_agrees():
    rng = stream(2, Purpose.PROBE)
    there = nn.Embedding(5, 3).double()
    chain = build_chain([spec.Embedding(vocabulary=5, units=3)], (4,), np.float64)
    tensors = {"layers.0.embedding.W": there.weight.detach().numpy()}
    x = rng.integers(0, 5, (ROWS, 4))
    dy = rng.standard_normal((ROWS, 4, 3))
    y, backward = chain.forward(tensors, x[None], make_run(training=True))
    sink = Gradients(chain.layout)
    backward(dy[None], sink)
    y_there = there(torch.from_numpy(x))
    y_there.backward(torch.from_numpy(dy))
    assert relative(y[0], y_there.detach().numpy()) == 0
    assert relative(sink.tensors["layers.0.embedding.W"][0], there.weight.grad.numpy()) < 1e-13


WEIGHTS = (0.5, 2.0, 1.0, 3.0)
LOSSES = {
    "cross_entropy": (spec.Loss(), "classes", lambda: nn.CrossEntropyLoss()),
    "smoothed": (spec.Loss(label_smoothing=0.2), "classes", lambda: nn.CrossEntropyLoss(label_smoothing=0.2)),
    "weighted": (
        spec.Loss(class_weights=WEIGHTS),
        "classes",
        lambda: nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double()),
    ),
    "both": (
        spec.Loss(class_weights=WEIGHTS, label_smoothing=0.2),
        "classes",
        lambda: nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double(), label_smoothing=0.2),
    ),
    "binary_cross_entropy": (spec.Loss(type="binary_cross_entropy"), "numbers", nn.BCEWithLogitsLoss),
    "mse": (spec.Loss(type="mse"), "numbers", nn.MSELoss),
    "huber": (spec.Loss(type="huber", delta=0.7), "numbers", lambda: nn.HuberLoss(delta=0.7)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree(name):
    config, kind, make = LOSSES[name]
    rng = stream(3, Purpose.PROBE)
    z = 2 * rng.standard_normal((ROWS, 4))
    target = rng.integers(0, 4, ROWS) if kind == "classes" else rng.random((ROWS, 4))
    sums = make_loss(config, kind, 4, 4)(z[None], target[None], np.ones((1, ROWS)), Workspace(), "loss")
    z_there = torch.from_numpy(z).requires_grad_()
    mean = make()(z_there, torch.from_numpy(target))
    mean.backward()
    assert sums.loss[0] / sums.weight[0] == pytest.approx(mean.item(), rel=1e-13)
    assert relative(sums.dz[0] / sums.weight[0], z_there.grad.numpy()) < 1e-13


OPTIMIZERS = {
    "sgd": (spec.Optimizer(weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
    "momentum": (
        spec.Optimizer(momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        spec.Optimizer(momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        spec.Optimizer(type="adam", weight_decay=0.1, beta1=0.8, eps=1e-3),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.999), eps=1e-3, weight_decay=0.1),
    ),
    "adamw": (
        spec.Optimizer(type="adamw", weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_agree(name):
    config, make = OPTIMIZERS[name]
    rng = stream(4, Purpose.PROBE)
    w = rng.standard_normal(50)
    there = torch.from_numpy(w.copy()).requires_grad_()
    peer = make([there])
    optimizer = make_optimizer(config)
    slots = [np.zeros(50) for _ in optimizer.slots]
    for count in range(1, 21):
        g = rng.standard_normal(50)
        new, new_slots = np.empty(50), [np.empty(50) for _ in slots]
        t, u = np.empty((2, 50))
        optimizer.stretch(w, 4 * g, slots, new, new_slots, optimizer.rates(0.25, 0.1, count), t, u)
        w, slots = new, new_slots
        there.grad = torch.from_numpy(g)
        peer.step()
    assert relative(w, there.detach().numpy()) < 1e-12

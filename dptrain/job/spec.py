"""What a job says, as plain frozen dataclasses: no checking here and no import of pydantic.

``dptrain.job.load`` checks a job file against these classes on one worker; the others rebuild the checked job with
:func:`rebuild`. A ``meta`` of ``LAUNCH`` marks what never decides bits (it belongs to the launch, not to the job),
``STOPPING`` what only decides when training ends.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

S = TypeVar("S")


class Role(Enum):
    """What a key takes part in; a key without a role decides bits."""

    LAUNCH = "launch"
    STOPPING = "stopping"


LAUNCH = {"role": Role.LAUNCH}
STOPPING = {"role": Role.STOPPING}


class Bound:
    """A number's limits, as metadata of its type: ``Bound(ge=1)``. pydantic's own classes would be slow to import."""

    def __init__(self, **limits: float) -> None:
        self.limits = limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The type's own schema with the limits added (pydantic's hook for metadata)."""
        return {**handler(source), **self.limits}


Count = Annotated[int, Bound(ge=1)]
Natural = Annotated[int, Bound(ge=0)]
Positive = Annotated[float, Bound(gt=0)]
NonNegative = Annotated[float, Bound(ge=0)]
Share = Annotated[float, Bound(ge=0, lt=1)]


class Spec:
    """Base of all parts of a job: unknown keys are refused, numbers must be finite, nothing changes once it is set.

    Equality and the rest are here and not in each class, as ``dataclass`` would have it: compiling six methods for
    each of thirty classes took a third of a rank's start.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(
                f"{type(self).__name__}.{name} is set already; dataclasses.replace makes a changed copy"
            )
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({values})"


@dataclass(kw_only=True, repr=False, eq=False)
class Synthetic(Spec):
    """Random data for benchmarks: a seeded random teacher with noise. ``classes`` 0 makes it a regression."""

    rows: Count = 10_000
    shape: tuple[Count, ...] = (32,)
    classes: Natural = 10
    noise: NonNegative = 0.1


@dataclass(kw_only=True, repr=False, eq=False)
class Data(Spec):
    """Where the rows come from and how they are read.

    ``task`` auto: integer and text labels are classes, floating-point ones numbers; ``classes`` 0 means as many as
    the training labels show. ``normalise`` auto: IDX pixels and the embedded digits are scaled to 0..1, all else
    stays. ``max_bytes`` bounds what a compressed file may unpack to.
    """

    source: str = "digits"
    format: Literal["auto", "embedded", "npz", "npy", "csv", "idx", "parquet", "synthetic"] = "auto"
    features: tuple[str, ...] = ()
    label: str = ""
    task: Literal["auto", "classes", "numbers"] = "auto"
    classes: Natural = 0
    shape: tuple[Count, ...] = ()
    validation: Share | str = 0.1
    test: Share | str = 0.1
    shuffle: bool = True
    normalise: Literal["auto", "none", "standard", "minmax", "scale"] = "auto"
    scale: Positive = 255.0
    missing: Literal["error", "mean", "median", "zero", "drop"] = "error"
    categories: Literal["error", "onehot", "ordinal"] = "onehot"
    max_categories: Count = 1_000
    nan: Literal["error", "skip"] = "error"
    label_normalise: Literal["none", "standard"] = "none"
    delimiter: str = ","
    max_bytes: Count = field(default=1 << 36, metadata=LAUNCH)
    synthetic: Synthetic = field(default_factory=Synthetic)


@dataclass(kw_only=True, repr=False, eq=False)
class Linear(Spec):
    """y = x W + b over the last axis."""

    type: Literal["linear"] = "linear"
    units: Count
    bias: bool = True
    init: Literal["he", "glorot", "uniform"] = "he"


@dataclass(kw_only=True, repr=False, eq=False)
class Conv2d(Spec):
    """A 2-D convolution over (height, width, channels)."""

    type: Literal["conv2d"] = "conv2d"
    channels: Count
    kernel: Count = 3
    stride: Count = 1
    padding: Natural | Literal["same"] = 0
    bias: bool = True
    init: Literal["he", "glorot", "uniform"] = "he"


@dataclass(kw_only=True, repr=False, eq=False)
class MaxPool2d(Spec):
    """The maximum of each window; ``stride`` 0 means the kernel's size."""

    type: Literal["max_pool2d"] = "max_pool2d"
    kernel: Count = 2
    stride: Natural = 0


@dataclass(kw_only=True, repr=False, eq=False)
class AvgPool2d(Spec):
    """The mean of each window; ``stride`` 0 means the kernel's size."""

    type: Literal["avg_pool2d"] = "avg_pool2d"
    kernel: Count = 2
    stride: Natural = 0


@dataclass(kw_only=True, repr=False, eq=False)
class Flatten(Spec):
    """All axes of a sample become one."""

    type: Literal["flatten"] = "flatten"


@dataclass(kw_only=True, repr=False, eq=False)
class Relu(Spec):
    """max(x, 0)."""

    type: Literal["relu"] = "relu"


@dataclass(kw_only=True, repr=False, eq=False)
class LeakyRelu(Spec):
    """x where positive, slope * x elsewhere."""

    type: Literal["leaky_relu"] = "leaky_relu"
    slope: Share = 0.01


@dataclass(kw_only=True, repr=False, eq=False)
class Gelu(Spec):
    """The tanh form of the Gaussian error linear unit."""

    type: Literal["gelu"] = "gelu"


@dataclass(kw_only=True, repr=False, eq=False)
class Tanh(Spec):
    """tanh x."""

    type: Literal["tanh"] = "tanh"


@dataclass(kw_only=True, repr=False, eq=False)
class Sigmoid(Spec):
    """1 / (1 + exp(-x))."""

    type: Literal["sigmoid"] = "sigmoid"


@dataclass(kw_only=True, repr=False, eq=False)
class Dropout(Spec):
    """Zeroes a share ``rate`` of the elements while training and scales the rest up."""

    type: Literal["dropout"] = "dropout"
    rate: Share = 0.5


@dataclass(kw_only=True, repr=False, eq=False)
class BatchNorm(Spec):
    """Normalises each channel (last axis) over the real rows of its shard."""

    type: Literal["batch_norm"] = "batch_norm"
    momentum: Annotated[float, Bound(gt=0, le=1)] = 0.1
    eps: Positive = 1e-5


@dataclass(kw_only=True, repr=False, eq=False)
class LayerNorm(Spec):
    """Normalises the last axis of each sample."""

    type: Literal["layer_norm"] = "layer_norm"
    eps: Positive = 1e-5


@dataclass(kw_only=True, repr=False, eq=False)
class Embedding(Spec):
    """Row i of a table of ``vocabulary`` rows for each integer i of the input."""

    type: Literal["embedding"] = "embedding"
    vocabulary: Count
    units: Count


Layer = (
    Linear
    | Conv2d
    | MaxPool2d
    | AvgPool2d
    | Flatten
    | Relu
    | LeakyRelu
    | Gelu
    | Tanh
    | Sigmoid
    | Dropout
    | BatchNorm
    | LayerNorm
    | Embedding
)


@dataclass(kw_only=True, repr=False, eq=False)
class Model(Spec):
    """A list of layers, or ``python = "file.py:function"`` for a model of one's own."""

    layers: tuple[Layer, ...] = ()
    python: str = ""
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    init_from: str = ""


@dataclass(kw_only=True, repr=False, eq=False)
class Loss(Spec):
    """What is minimised. ``auto``: cross-entropy for classes, mean squared error for numbers."""

    type: Literal["auto", "cross_entropy", "binary_cross_entropy", "mse", "huber"] = "auto"
    label_smoothing: Share = 0.0
    class_weights: tuple[Positive, ...] = ()
    delta: Positive = 1.0
    metrics: tuple[Literal["accuracy", "top_k", "mae", "r2"], ...] = ()
    top_k: Count = 5


@dataclass(kw_only=True, repr=False, eq=False)
class Schedule(Spec):
    """How the learning rate moves. Lengths are in steps; ``decay_steps`` 0 means the whole of the training."""

    type: Literal["constant", "step", "cosine"] = "constant"
    warmup_steps: Natural = 0
    step_size: Count = 1_000
    gamma: Annotated[float, Bound(gt=0, le=1)] = 0.1
    decay_steps: Natural = 0
    minimum: NonNegative = 0.0


@dataclass(kw_only=True, repr=False, eq=False)
class Optimizer(Spec):
    """How weights follow gradients. ``clip_norm`` 0 means no clipping."""

    type: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Positive = 1e-8
    clip_norm: NonNegative = 0.0
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(kw_only=True, repr=False, eq=False)
class Stop(Spec):
    """A convergence criterion on the validation part: a target reached, or ``patience`` evaluations without a gain.

    ``patience`` 0 and no ``target`` mean none. ``metric`` is "loss" or one of the job's metrics.
    """

    metric: Literal["loss", "accuracy", "top_k", "mae", "r2"] = "loss"
    target: float | None = field(default=None, metadata=STOPPING)
    patience: Natural = field(default=0, metadata=STOPPING)
    min_delta: NonNegative = 0.0


@dataclass(kw_only=True, repr=False, eq=False)
class Train(Spec):
    """How long and in which slices. Exactly one of ``epochs`` and ``steps`` is above 0.

    ``shards`` None means 8, or as many as the batch has rows; a loaded job has a number there.
    """

    batch_size: Count = 64
    shards: Count | None = None
    drop_last: bool = False
    epochs: Natural = field(default=0, metadata=STOPPING)
    steps: Natural = field(default=0, metadata=STOPPING)
    evaluate_steps: Natural = 0
    evaluate_rows: Count = 256
    result: Literal["last", "best"] = "last"
    stop: Stop = field(default_factory=Stop)
    non_finite: Literal["stop", "skip"] = "stop"
    dtype: Literal["float32", "float64"] = "float32"


@dataclass(kw_only=True, repr=False, eq=False)
class Arithmetic(Spec):
    """``native``: this CPU's kernels. ``portable``: kernels that every x86-64 machine with AVX2 has.

    ``products`` "mkl": the layers' matrix products are made by Intel's MKL, which has to be installed.
    ``accept_other`` goes on from a checkpoint that was made with other kernels, and gives up the same bits.
    ``compiled`` "auto" uses numba for what it makes faster with the same bits, where it is installed.

    ``gradients``: the type that a shard's gradient and every sum of gradients are rounded to, "auto" the job's
    ``train.dtype``; or "top_k": of each tensor of a shard's gradient only the ``top_k`` share of largest elements is
    added, and the rest with the shard's next gradient.
    """

    kernels: Literal["native", "portable"] = "native"
    threads: Count = 1
    products: Literal["numpy", "mkl"] = "numpy"
    gradients: Literal["auto", "float32", "bfloat16", "float16", "top_k"] = "auto"
    top_k: Annotated[float, Bound(gt=0, le=1)] = 0.01
    accept_other: bool = field(default=False, metadata=LAUNCH)
    compiled: Literal["auto", "never"] = field(default="auto", metadata=LAUNCH)


@dataclass(kw_only=True, repr=False, eq=False)
class Exchange(Spec):
    """How partials meet. ``coordinators`` 0 means every worker; ``deadline`` is in seconds.

    A worker that gives no sign of life for ``hang_seconds``, or ten steps, is ended; 0 means never.

    Every ``compare_steps`` all that hold a state of their own compare its digests; every ``recheck_steps`` one
    worker's gradient is computed by another too. 0 means never.

    ``auto`` is ``solo`` for one worker and ``node`` for several. ``node``: the workers of a machine share memory, and
    messages go between machines only. ``segments``: messages everywhere. ``ps``: a parameter server over gRPC, without
    MPI. There a worker that gives no sign of life for ``lease_seconds`` loses its shards to others, and the
    ``backup_workers`` slowest shards of a step are computed twice; with ``host_sum`` the workers that are started
    together on a machine add up there and send one sum. Each of several ``servers`` adds up a segment of the vector.
    With ``standby`` there is one more, without a segment. Every server has every update before it counts, so that the
    others go on when one dies.

    ``mode`` "async": a worker computes a batch, and its gradient makes a step as soon as it is there, whatever others
    did meanwhile. "ssp": at most ``staleness`` steps after the weights that it was computed with; 0 is "sync". With
    ``staleness_lr`` "inverse" an update gets lr / (1 + its staleness). Neither promises the same bits.
    """

    type: Literal["auto", "solo", "node", "segments", "allreduce", "ps"] = "auto"
    coordinators: Natural = 0
    deadline: Positive = 600.0
    hang_seconds: NonNegative = 5.0
    compare_steps: Natural = 500
    recheck_steps: Natural = 0
    lease_seconds: Positive = 10.0
    backup_workers: Natural = 0
    host_sum: bool = True
    servers: Count = 1
    standby: bool = False
    mode: Literal["sync", "async", "ssp"] = "sync"
    staleness: Natural = 8
    staleness_lr: Literal["constant", "inverse"] = "constant"

    @property
    def in_step(self) -> bool:
        """Whether every gradient is of the newest weights."""
        return self.mode == "sync" or (self.mode == "ssp" and self.staleness == 0)

    @property
    def bound(self) -> int | None:
        """The highest staleness of an update; None where there is none."""
        return None if self.mode == "async" else self.staleness if self.mode == "ssp" else 0


@dataclass(kw_only=True, repr=False, eq=False)
class Output(Spec):
    """What a run writes and when. ``journal_steps`` 0 means as often as keeps the journal small.

    ``tensorboard``: whether the run has an event file for TensorBoard.
    """

    runs: str = "runs"
    journal_steps: Natural = 0
    checkpoint_seconds: NonNegative = 30.0
    checkpoint_steps: Natural = 0
    generations: Count = 3
    tensorboard: Literal["always", "never"] = "always"


@dataclass(kw_only=True, repr=False, eq=False)
class Job(Spec):
    """One training job: everything that decides the bits of its result, and how to launch it."""

    name: str = field(default="job", metadata=LAUNCH)
    seed: Annotated[int, Bound(ge=0, lt=1 << 63)] = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    exchange: Exchange = field(default_factory=Exchange, metadata=LAUNCH)
    output: Output = field(default_factory=Output, metadata=LAUNCH)
    directory: str = field(default=".", metadata=LAUNCH)
    """The folder that relative paths of the job are meant from."""


LAYERS: dict[str, type[Spec]] = {cls.__dataclass_fields__["type"].default: cls for cls in get_args(Layer)}


def needs_validation(job: Job) -> bool:
    """Whether evaluations decide something: when to stop, or which weights are kept."""
    stop = job.train.stop
    return job.train.result == "best" or stop.patience > 0 or stop.target is not None


def plain(spec: Any) -> Any:
    """A spec as plain data (dicts, lists, numbers, strings), the reverse of :func:`rebuild`."""
    if is_dataclass(spec) and not isinstance(spec, type):
        return {f.name: plain(getattr(spec, f.name)) for f in fields(spec)}
    if isinstance(spec, Mapping):
        return {key: plain(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [plain(value) for value in spec]
    return spec


def rebuild(cls: type[S], data: Mapping[str, Any]) -> S:
    """A spec from :func:`plain` data that was checked before."""
    hints = get_type_hints(cls)
    return cls(**{key: _value(hints[key], value) for key, value in data.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping) and "type" in value and hint == Layer:
        return rebuild(LAYERS[value["type"]], value)
    if isinstance(hint, type) and issubclass(hint, Spec):
        return rebuild(hint, value)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(get_args(hint)[0], item) for item in value)
    if get_origin(hint) in (Union, types.UnionType) and isinstance(value, list):
        return tuple(value)
    return value

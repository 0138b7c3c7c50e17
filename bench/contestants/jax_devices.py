"""JAX over as many CPU devices as workers: one jitted step, shard_map over the rows of a batch.

XLA's pool has twice as many threads as there are devices, and steps are not dispatched ahead: with a thread a device,
which is the default on as many cores, XLA 0.10's all-reduce was seen to wait for itself for ever.
"""

import json
import os
import sys
from typing import Any

from bench.workload import Model, Workload

Tensors = list[Any]


def main(work: Workload) -> None:
    """Train and print what it came to."""
    devices = work.workers
    os.environ["NPROC"] = str(2 * devices if devices > 1 else 1)
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if devices == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    # Only now may JAX be imported: it reads these once.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from bench import clock
    from bench.rows import Integers, read

    jax.config.update("jax_cpu_enable_async_dispatch", devices == 1)
    everywhere, split = PartitionSpec(), PartitionSpec("workers")
    mesh = Mesh(np.array(jax.devices("cpu")), ("workers",))
    model = work.network
    rng = np.random.default_rng([work.seed, 0])
    start = []
    for W, b in zip(model.parameter_shapes()[0::2], model.parameter_shapes()[1::2], strict=True):
        bound = 1 / np.sqrt(W[0])
        start += [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in (W, b)]

    def loss_of(weights: Tensors, x: Any, y: Any) -> Any:
        z = jax.nn.log_softmax(forward(model, weights, x))
        return jax.lax.pmean(-jnp.mean(jnp.take_along_axis(z, y[:, None], axis=1)), "workers")

    def one(weights: Tensors, momenta: Tensors, x: Any, y: Any, rows: Any) -> tuple[Tensors, Tensors, Any]:
        loss, gradients = jax.value_and_grad(loss_of)(weights, x[rows], y[rows])
        momenta = [work.momentum * m + g for m, g in zip(momenta, gradients, strict=True)]
        return [w - work.lr * m for w, m in zip(weights, momenta, strict=True)], momenta, loss

    mapped = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, everywhere, split),
        out_specs=(everywhere, everywhere, everywhere),
    )
    jitted = jax.jit(mapped, donate_argnums=(0, 1))
    replicated, by_rows = NamedSharding(mesh, everywhere), NamedSharding(mesh, split)
    x, y = jax.device_put(read(work.data), replicated)
    weights = jax.device_put(start, replicated)
    momenta = jax.device_put([np.zeros_like(w) for w in start], replicated)

    def step(batch: Integers) -> Any:
        nonlocal weights, momenta
        weights, momenta, loss = jitted(weights, momenta, x, y, jax.device_put(batch, by_rows))
        return loss

    print(json.dumps(clock.train(work, step, lambda: None)), flush=True)


def forward(model: Model, weights: Tensors, x: Any) -> Any:
    """The model's output; images are (rows, height, width, channels)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    rest = iter(weights)
    for layer, before, after in model.tensors():
        match layer["type"]:
            case "linear":
                x = x @ next(rest) + next(rest)
            case "conv2d":
                k = layer["kernel"]
                W = next(rest).reshape(k, k, before[2], after[2])
                x = lax.conv_general_dilated(x, W, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                x = x + next(rest)
            case "max_pool2d":
                window = (1, layer["kernel"], layer["kernel"], 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            case "flatten":
                x = x.reshape(len(x), -1)
            case "relu":
                x = jax.nn.relu(x)
    return x


if __name__ == "__main__":
    main(Workload.parse(sys.argv[1]))

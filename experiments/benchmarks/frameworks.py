"""The programs that benchmark.py times: each trains a network, epoch after epoch, in its own process.

python experiments/benchmarks/frameworks.py NAME FOLDER/config.json

After each epoch a program prints its `seconds`, and what else it knows (`validation_bce`, in nats per pixel), as JSON
on stdout, and waits for a line on stdin. A run that it writes is FOLDER/run.
"""

import contextlib
import functools
import json
import multiprocessing
import operator
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

if sys.argv[1:2] == ["fit"]:  # as in the tutorial: TensorFlow starts with its own choice of oneDNN, not with dae's
    import tensorflow  # noqa: F401

import keras_fit

from dae import config as config_module
from dae.config import RunConfig
from dae.errors import UsageError

# Ends one epoch, with what is known about it, and starts the next.
Lap = Callable[..., None]
# Starts the first epoch; called when all imports are done.
Start = Callable[[], Lap]


def stopwatch(output: IO[str]) -> Lap:
    """Start the first epoch; what is known about each epoch is written to `output`."""
    started = time.perf_counter()

    def lap(known: Mapping[str, float] | None = None) -> None:
        nonlocal started
        print(json.dumps({**(known or {}), "seconds": time.perf_counter() - started}), file=output, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        started = time.perf_counter()

    return lap


def dae_train(config: RunConfig, start: Start) -> None:
    """Train with this package as a user would: with progress bar, all metrics, summaries and checkpoints."""
    from dae import cli

    _make_stderr_a_terminal()
    cli.import_tensorflow(config.onednn)
    from dae.training.trainer import train

    train(config, Path(sys.argv[2]).with_name("run"), on_epoch_end=start())


def _make_stderr_a_terminal() -> None:
    """Make tqdm draw its bar as it does for a user; what it draws is copied to the original stderr."""
    original, (screen, terminal) = os.dup(2), os.openpty()
    os.dup2(terminal, 2)

    def copy() -> None:
        while output := os.read(screen, 65536):
            os.write(original, output)

    threading.Thread(target=copy, daemon=True).start()


def fit(config: RunConfig, start: Start) -> None:
    """Train with Keras's `fit` as in keras_fit.py, but with the images and the validation of `config`."""
    from dae.data import datasets, pipeline

    lap = start()
    model, splits = keras_fit.compiled(config), datasets.load(config)
    noisy, clean = keras_fit.with_noise(splits.train.pixels, config)
    batches = list(pipeline.evaluation_batches(splits.validation, config, "validation"))
    validation = tuple(np.concatenate(part) for part in zip(*((one.noisy, one.clean) for one in batches), strict=True))
    while True:
        history = model.fit(
            noisy, clean, batch_size=config.batch_size, shuffle=True, validation_data=validation, verbose=0
        )
        lap({"validation_bce": history.history["val_loss"][0]})


def torch_network(model: Any) -> Any:
    """Return a torch.nn.Module that computes what `model`, a keras.Model, computes, with the same weights.

    It maps [batch, C, H, W] to logits [batch, C, H, W]: it lacks the sigmoid that `model` ends in. Raises UsageError if
    a layer is not translated here, or has settings with which the results differ.
    """
    import keras
    import torch
    from torch import fx, nn

    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    last = [layer for layer in layers if not isinstance(layer, keras.layers.Cropping2D)][-1]
    graph, root = fx.Graph(), nn.Module()
    values = {id(model.inputs[0]): graph.placeholder("noisy")}
    for layer in layers:
        inputs = [values[id(tensor)] for tensor in keras.tree.flatten(layer.input)]
        match type(layer).__name__:
            case "Add":
                value = functools.reduce(lambda a, b: graph.call_function(operator.add, (a, b)), inputs)
            case "Concatenate":
                value = graph.call_function(torch.cat, (inputs, 1))
            case _:
                value = inputs[0]
                for number, module in enumerate(_torch_modules(layer, is_last=layer is last)):
                    root.add_module(f"{layer.name}_{number}", module)
                    value = graph.call_module(f"{layer.name}_{number}", (value,))
        values[id(layer.output)] = value
    graph.output(values[id(model.outputs[0])])
    network = fx.GraphModule(root, graph)
    images = np.random.default_rng(0).random((2, *model.input_shape[1:]), np.float32)
    with torch.no_grad():
        found = torch.sigmoid(network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    if found.shape != expected.shape or not np.allclose(found, expected, atol=1e-4):
        raise UsageError(
            f"--model: PyTorch computes other values than {model.name}; choose one of the package's networks"
        )
    return network.train()


def _torch_modules(layer: Any, is_last: bool) -> list[Any]:
    """Return the modules that, one after the other, compute what a Keras layer of one input computes."""
    from torch import nn

    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    after: list[Any] = {"relu": [nn.ReLU()], "sigmoid": [] if is_last else [nn.Sigmoid()]}.get(activation, [])
    match type(layer).__name__:
        case "Conv2D":
            (height, width, inputs, outputs), (top, bottom, left, right) = layer.kernel.shape, _same_padding(layer)
            equal = (top, left) == (bottom, right)
            padding, before = ((top, left), []) if equal else (0, [nn.ZeroPad2d((left, right, top, bottom))])
            conv = nn.Conv2d(inputs, outputs, (height, width), layer.strides, padding, bias=layer.use_bias)
            return [*before, _with_weights(conv, layer), *after]
        case "Conv2DTranspose":
            height, width, outputs, inputs = layer.kernel.shape
            padding = ((height - layer.strides[0]) // 2, (width - layer.strides[1]) // 2)
            conv = nn.ConvTranspose2d(inputs, outputs, (height, width), layer.strides, padding, bias=layer.use_bias)
            return [_with_weights(conv, layer), *after]
        case "BatchNormalization":
            norm = nn.BatchNorm2d(layer.gamma.shape[0], eps=layer.epsilon, momentum=1 - layer.momentum)
            return [_with_weights(norm, layer)]
        case "MaxPooling2D":
            return [nn.MaxPool2d(layer.pool_size, layer.strides, ceil_mode=layer.padding == "same")]
        case "UpSampling2D":
            return [nn.Upsample(scale_factor=layer.size, mode=layer.interpolation)]
        case "ZeroPadding2D":
            return [nn.ZeroPad2d((*layer.padding[1], *layer.padding[0]))]
        case "Cropping2D":
            return [nn.ZeroPad2d(tuple(-pixels for axis in reversed(layer.cropping) for pixels in axis))]
        case "Activation" | "ReLU":
            return after if hasattr(layer, "activation") else [nn.ReLU()]
    raise UsageError(f"--model: {layer.name} is a {type(layer).__name__}, which is not translated to PyTorch")


def _same_padding(layer: Any) -> tuple[int, ...]:
    """Return how many pixels TensorFlow adds at the top, bottom, left and right; with strides, they can differ."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    axes = zip(layer.input.shape[1:3], layer.kernel_size, layer.strides, strict=True)
    totals = [max((-(-pixels // stride) - 1) * stride + size - pixels, 0) for pixels, size, stride in axes]
    return tuple(pixels for total in totals for pixels in (total // 2, total - total // 2))


def _with_weights(module: Any, layer: Any) -> Any:
    import torch

    names = [
        name for name in ("weight", "bias", "running_mean", "running_var") if getattr(module, name, None) is not None
    ]
    for name, values in zip(names, layer.get_weights(), strict=True):
        values = values.transpose(3, 2, 0, 1) if values.ndim == 4 else values  # for both kinds of convolution
        getattr(module, name).data = torch.from_numpy(np.ascontiguousarray(values))
    return module


def pickled_torch_network(config: RunConfig) -> bytes:
    """Return the network of `config` as a pickled torch.nn.Module."""
    from dae import cli

    cli.import_tensorflow()
    from dae.data import datasets
    from dae.models import networks

    return pickle.dumps(torch_network(networks.build(config, datasets.load(config).train.image_shape)))


def torch_eager(config: RunConfig, start: Start, layout: str = "channels_last", compile_it: bool = False) -> None:
    """Train with PyTorch, noise made on the fly; no validation. `layout` is the name of a torch.memory_format."""
    import torch
    from torch import nn

    from dae.data import datasets

    # Another process translates the network, because TensorFlow in this one would take memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pickle.loads(pool.apply(pickled_torch_network, [config]))
    lap, memory_format = start(), getattr(torch, layout)
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, eps=1e-7)
    images = torch.from_numpy(np.ascontiguousarray(datasets.load(config).train.pixels.transpose(0, 3, 1, 2)))

    def loss_of(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(noisy), clean)

    compute = torch.compile(loss_of) if compile_it else loss_of
    while True:
        for some in torch.randperm(len(images)).split(config.batch_size):
            clean = (images[some].float() / 255).contiguous(memory_format=memory_format)
            noisy = (clean + config.noise_range[0] * torch.randn_like(clean)).clamp(0, 1)
            optimizer.zero_grad()
            compute(noisy, clean).backward()
            optimizer.step()
        lap()


def torch_contiguous(config: RunConfig, start: Start) -> None:
    """Train with PyTorch and its default layout, with the channels before height and width."""
    torch_eager(config, start, layout="contiguous_format")


def torch_compile(config: RunConfig, start: Start) -> None:
    """Train with PyTorch and `torch.compile`."""
    torch_eager(config, start, compile_it=True)


def jax_jit(config: RunConfig, start: Start) -> None:
    """Train `conv` with JAX, the whole step with its noise under `jit`; no validation."""
    if config.model != "conv":
        raise UsageError(f"--model: JAX jit is written for conv, not {config.model}; leave it out with --only")
    import jax
    import jax.numpy as jnp

    from dae.data import datasets

    lap = start()
    few, many = 8 * config.width, 16 * config.width
    channels = [(1, many), (many, few), (few, few), (few, few), (few, few), (few, many), (many, 1)]
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(jax.random.key(config.seed), len(channels))
    weights = [(glorot(key, (3, 3, *sizes)), jnp.zeros(sizes[1])) for key, sizes in zip(keys, channels, strict=True)]

    def conv(x: Any, weight: tuple[Any, Any], padding: str = "SAME") -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight[0], (1, 1), padding, dimension_numbers=layout) + weight[1]

    def loss_of(weights: Any, noisy: Any, clean: Any) -> Any:
        x = noisy
        for weight in weights[:3]:
            x = jax.nn.relu(conv(x, weight))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        for weight, padding in zip(weights[3:6], ("SAME", "SAME", "VALID"), strict=True):
            x = jax.nn.relu(conv(x, weight, padding)).repeat(2, 1).repeat(2, 2)
        logits = conv(x, weights[6])
        return jnp.mean(jax.nn.softplus(logits) - clean * logits)

    @jax.jit
    def step(weights: Any, first: Any, second: Any, count: Any, pixels: Any) -> Any:
        clean = pixels / 255.0
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), count), clean.shape)
        noisy = jnp.clip(clean + config.noise_range[0] * noise, 0, 1)
        gradients = jax.grad(loss_of)(weights, noisy, clean)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
        rate = config.learning_rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        moved = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-7), weights, first, second)
        return moved, first, second

    images = datasets.load(config).train.pixels
    first = second = jax.tree.map(jnp.zeros_like, weights)
    count, random = 0, np.random.default_rng(config.seed)
    while True:
        order = random.permutation(len(images))
        for place in range(0, len(images), config.batch_size):
            count += 1
            some = images[order[place : place + config.batch_size]]
            weights, first, second = step(weights, first, second, jnp.float32(count), some)
        jax.block_until_ready(weights)
        lap()


def matrix_product(config: RunConfig, start: Start) -> None:
    """Multiply 2,048 x 2,048 float32 matrices twenty times per epoch, which shows what the processor can do."""
    import tensorflow as tf

    lap = start()
    matrix = tf.random.stateless_normal((2048, 2048), seed=(0, 1))
    while True:
        for _ in range(20):
            tf.matmul(matrix, matrix).numpy()
        lap()


def pipeline_alone(config: RunConfig, start: Start) -> None:
    """Produce the batches of this package without using them."""
    from dae import cli

    cli.import_tensorflow(config.onednn)
    from dae import runtime
    from dae.data import datasets, pipeline

    lap = start()
    images = datasets.load(runtime.resolve(config)).train
    for number, _ in enumerate(pipeline.training_batches(images, config), 1):
        if number % pipeline.steps_per_epoch(len(images), config.batch_size) == 0:
            lap()


def step_alone(config: RunConfig, start: Start, steps_per_call: int | None = None) -> None:
    """Take the train step of this package on the same batch over and over, by default an epoch per call."""
    from dae import cli

    cli.import_tensorflow(config.onednn)
    import tensorflow as tf

    from dae.data.pipeline import training_batches
    from dae.training.task import prepare
    from dae.training.train_state import TrainState
    from dae.training.train_step import make_train_loop, make_train_step

    lap = start()
    task = prepare(config)
    batches = iter(training_batches(task.data.train, config).take(1).cache().repeat())
    state = TrainState(task.model, task.loss, task.optimizer)
    train_loop = make_train_loop(make_train_step(state, task.objective(state.step), task.config))
    while True:
        left = task.steps_per_epoch
        while left > 0:
            num_steps = min(left, steps_per_call or left)
            train_loop(batches, tf.constant(num_steps), config.batch_size)
            left -= num_steps
        lap()


PROGRAMS: dict[str, Callable[[RunConfig, Start], None]] = {
    program.__name__: program
    for program in (
        dae_train,
        fit,
        torch_eager,
        torch_contiguous,
        torch_compile,
        jax_jit,
        matrix_product,
        pipeline_alone,
        step_alone,
    )
}
for _steps in (1, 5, 10, 20, 40):
    PROGRAMS[f"{_steps} steps per call"] = functools.partial(step_alone, steps_per_call=_steps)


def main() -> None:
    name, config_path = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on stdout goes to stderr
    with contextlib.suppress(KeyboardInterrupt):
        PROGRAMS[name](config_module.read(Path(config_path)), functools.partial(stopwatch, output))


if __name__ == "__main__":
    main()

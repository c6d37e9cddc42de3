"""Random weights in the layout of the published mask decoder's file, and its equations in NumPy, in float64."""

from itertools import pairwise

import numpy as np

CHANNELS = [128, 128, 64, 32, 16]


def published(width=6, seed=0):
    """Arrays by the file's names. He-scaled, so that values neither vanish nor explode over a dozen layers."""
    random = np.random.default_rng(seed)
    arrays = {"_vq_vae._embedding": random.normal(size=(128, width)).astype(np.float32)}

    def conv(name, out_axis, *shape):
        fan_in = np.prod(shape) // shape[out_axis]
        arrays[f"{name}.weight"] = (random.normal(size=shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        arrays[f"{name}.bias"] = random.normal(size=shape[out_axis], scale=0.1).astype(np.float32)

    def residual(name, channels):
        conv(f"{name}.net.0", 0, channels, channels, 3, 3)
        conv(f"{name}.net.2", 0, channels, channels, 3, 3)
        conv(f"{name}.net.4", 0, channels, channels, 1, 1)

    conv("decoder.0", 0, 128, width, 1, 1)
    for n in (2, 3):
        residual(f"decoder.{n}", 128)
    for n, (before, after) in enumerate(pairwise(CHANNELS)):
        conv(f"decoder.{4 + 2 * n}", 1, before, after, 4, 4)
    conv("decoder.12", 0, 1, 16, 1, 1)
    conv("encoder.0", 0, 8, 1, 4, 4)  # of the encoder's, which the file holds beside, one layer
    return arrays


def same_conv(x_CYX, weight, bias):
    """TensorFlow's SAME, one output pixel at a time."""
    _, rows, columns = x_CYX.shape
    out, _, ky, kx = weight.shape
    top, left = (ky - 1) // 2, (kx - 1) // 2
    canvas = np.zeros((len(x_CYX), rows + ky - 1, columns + kx - 1))
    canvas[:, top : top + rows, left : left + columns] = x_CYX
    y = np.empty((out, rows, columns))
    for i in range(rows):
        for j in range(columns):
            y[:, i, j] = np.tensordot(weight, canvas[:, i : i + ky, j : j + kx], 3) + bias
    return y


def transposed_conv(x_CYX, weight, bias, stride=2, padding=1):
    """Every input pixel stamps the kernel onto the result; then the edges are cut off."""
    _, rows, columns = x_CYX.shape
    _, out, ky, kx = weight.shape
    canvas = np.zeros((out, (rows - 1) * stride + ky, (columns - 1) * stride + kx))
    for i in range(rows):
        for j in range(columns):
            stamp = np.tensordot(x_CYX[:, i, j], weight, 1)
            canvas[:, i * stride : i * stride + ky, j * stride : j * stride + kx] += stamp
    end_y, end_x = canvas.shape[1] - padding, canvas.shape[2] - padding
    return canvas[:, padding:end_y, padding:end_x] + bias[:, None, None]


def _relu(x):
    return np.maximum(x, 0)


def _layer(arrays, name):
    return arrays[f"{name}.weight"].astype(np.float64), arrays[f"{name}.bias"].astype(np.float64)


def _residual(arrays, name, x):
    y = _relu(same_conv(x, *_layer(arrays, f"{name}.net.0")))
    y = _relu(same_conv(y, *_layer(arrays, f"{name}.net.2")))
    return x + same_conv(y, *_layer(arrays, f"{name}.net.4"))


def decode(arrays, codes):
    """16 codes to (64, 64)."""
    rows = arrays["_vq_vae._embedding"].astype(np.float64)[list(codes)]
    x = np.empty((rows.shape[1], 4, 4))
    for n, row in enumerate(rows):
        x[:, n // 4, n % 4] = row
    x = _relu(same_conv(x, *_layer(arrays, "decoder.0")))
    x = _residual(arrays, "decoder.3", _residual(arrays, "decoder.2", x))
    for n in (4, 6, 8, 10):
        x = _relu(transposed_conv(x, *_layer(arrays, f"decoder.{n}")))
    return same_conv(x, *_layer(arrays, "decoder.12"))[0]

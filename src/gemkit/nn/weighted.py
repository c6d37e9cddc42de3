"""The modules that own a weight: what every part of every model is put together from."""

from __future__ import annotations

from typing import Any

from torch.nn import Module, Parameter

from gemkit import ops


class Weighted(Module):
    """A module that owns a weight, dense (a `Parameter`) or quantized (`ops.Quantized`)."""

    weight: Any

    def hold(self, name: str, value) -> None:
        """Replace a weight: by a `Parameter`, or by something quantized, which no optimizer must ever find."""
        self._parameters.pop(name, None)
        self.__dict__.pop(name, None)
        setattr(self, name, value)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if isinstance(self.__dict__.get("weight"), ops.Quantized):  # moves with the module, but is never cast
            self.weight = self.weight.to(fn(self.weight.planes["codes"][:0]).device)
        return self


class Embedding(Weighted):
    """Rows of a table by token id, scaled."""

    def __init__(self, rows: int, width: int, scale: float, scale_dtype: str):
        super().__init__()
        self.weight = Parameter(ops.new_weight(rows, width))
        self.scale, self.scale_dtype = scale, scale_dtype
        self.run_dtype: Any = None  # what a quantized table is read as; None is float32

    def forward(self, tokens_T):
        return ops.embed(tokens_T, self.weight, self.scale, self.scale_dtype, self.run_dtype)

    def extra_repr(self):
        return "{}, {}".format(*self.weight.shape)


class Linear(Weighted):
    """A projection; the weight is (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = Parameter(ops.new_weight(out_features, in_features))
        self.bias = Parameter(ops.new_weight(out_features)) if bias else None

    def forward(self, x_TI):
        return ops.linear(x_TI, self.weight, self.bias)

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        kind = f", {self.weight.kind.name}" if isinstance(self.weight, ops.Quantized) else ""
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}{kind}"


class Head(Weighted):
    """The projection to the vocabulary, by the embedding's own weight (tied in every member)."""

    def __init__(self, embedding: Embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x_TD):
        return ops.linear(x_TD, self.weight)

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, tied to embed_tokens"


class RMSNorm(Weighted):
    """Division by the root mean square, then by channel times `1 + weight`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = Parameter(ops.new_weight(width))
        self.eps = eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LayerNorm(Weighted):
    """The ordinary norm of mean and variance, with a weight that is the factor itself and a bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = Parameter(ops.new_weight(width))
        self.bias = Parameter(ops.new_weight(width))
        self.eps = eps

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"

"""The modules that own a weight: what every part of every model is put together from."""

from __future__ import annotations

from typing import Any

from torch.nn import Module, Parameter

from gemkit import ops


class ParamModule(Module):
    """A module that owns a weight, dense (a `Parameter`) or quantized (`ops.Quantized`)."""

    weight: Any

    def set_param(self, name: str, value) -> None:
        """Replace a weight: by a `Parameter`, or by something quantized, which no optimizer must ever find."""
        self._parameters.pop(name, None)
        self.__dict__.pop(name, None)
        setattr(self, name, value)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if isinstance(self.__dict__.get("weight"), ops.Quantized):  # moves with the module, but is never cast
            self.weight = self.weight.to(fn(self.weight.planes["codes"][:0]).device)
        return self


class Recomputable(Module):
    """A block whose activations can be computed again in the backward instead of kept (activation checkpointing).

    Its arithmetic is `compute`. The flag is the trainer's; the choice lies inside of `forward`, so that hooks, FSDP2's
    among them, and compilation see a plain module.
    """

    activation_checkpointing = False
    compute: Any

    def forward(self, *args):
        return ops.recomputed(self.compute, *args) if self.activation_checkpointing else self.compute(*args)


class LoRAHost(ParamModule):
    """A module with adapters beside its weight, if it has any: each takes the result of those before it, and returns
    its own."""

    def __init__(self):
        super().__init__()
        self.adapters: Any = None  # a ModuleDict by name, once there is one
        self.merged: Any = None  # what `adapters.lora` needs to take merged adapters out of the weight again


class Embedding(LoRAHost):
    """Rows of a table by token id, scaled. What an adapter adds to them never changes the head, whose table it is."""

    def __init__(self, rows: int, width: int, scale: float, scale_dtype: str):
        super().__init__()
        self.weight = Parameter(ops.new_weight(rows, width))
        self.scale, self.scale_dtype = scale, scale_dtype
        self.run_dtype: Any = None  # what a quantized table is read as; None is float32

    def forward(self, tokens_T):
        x_TD = ops.embed(tokens_T, self.weight, self.scale, self.scale_dtype, self.run_dtype)
        if self.adapters is not None:
            for adapter in self.adapters.values():
                x_TD = adapter(x_TD, tokens_T, self.weight)
        return x_TD

    def extra_repr(self):
        return "{}, {}".format(*self.weight.shape)


class Projection(LoRAHost):
    """The base of linear projections: rows times a weight, then what adapters make of the product."""

    bias: Any

    def forward(self, x_TI):
        return self.project(x_TI)

    def project(self, x_TI):
        """The product and a bias, through the adapters: (T, in) to (T, out)."""
        y_TO = ops.linear(x_TI, self.weight, self.bias)
        if self.adapters is not None:
            for adapter in self.adapters.values():
                y_TO = adapter(y_TO, x_TI, self.weight, self.bias)
        return y_TO


class Linear(Projection):
    """A projection; the weight is (out, in)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = Parameter(ops.new_weight(out_features, in_features))
        self.bias = Parameter(ops.new_weight(out_features)) if bias else None

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        kind = f", {self.weight.kind.name}" if isinstance(self.weight, ops.Quantized) else ""
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}{kind}"


class Head(Projection):
    """The projection to the vocabulary, by the embedding's own weight (tied in every member), and the final soft cap.

    An adapter on it changes the logits alone, and never what a token is embedded as.
    """

    _embedding: Any
    vocabulary: ops.Vocabulary = ops.WHOLE  # tensor parallelism: some of the rows are in other processes

    def __init__(self, embedding: Embedding, softcap: float | None = None):
        super().__init__()
        self.weight, self.bias, self.softcap = embedding.weight, None, softcap
        self.__dict__["_embedding"] = embedding  # not a child of this module

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """All but the tied table, which is listed as the embedding's: tools that add up modules count it once. The
        head's own, without those of modules in it, has the table, so that what replaces parameters (FSDP) finds it."""
        table = self._embedding.weight if recurse else None
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        return ((name, weight) for name, weight in found if weight is not table)

    def forward(self, x_TI, loss: ops.ChunkedLoss | None = None):
        """Logits (T, V), in float32 where a soft cap applies; with `loss`, what it makes of them (`ops.ChunkedLoss`)
        a chunk of rows at a time, so that (T, V) is never there."""
        if loss is not None:
            return ops.linear_cross_entropy(x_TI, loss, self._operands(self.forward, self._table()))
        logits_TV = self.project(x_TI)
        return logits_TV if self.softcap is None else ops.softcap(logits_TV, self.softcap)

    def loss(self, x_TD, loss: ops.ChunkedLoss):
        """`loss` of the logits of some rows. Hooks on this module, if there are any, see the logits of each chunk."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if hooks and self.vocabulary is ops.WHOLE:  # those of a divided head are not there to look
            return ops.linear_cross_entropy(x_TD, loss, self._operands(self, None))
        return self(x_TD, loss)

    def _table(self) -> Any:
        """The table, if the head is a product with it and nothing else but the cap."""
        plain = type(self) is Head and self.bias is None and not self.adapters and "project" not in self.__dict__
        return self.weight if plain else None

    def _operands(self, project, table) -> ops.LogitsHead:
        beside = [] if self.adapters is None else [*self.adapters.parameters()]
        own = [weight for weight in (self.weight, self.bias) if not isinstance(weight, ops.Quantized | None)]
        trained = [weight for weight in (*own, *beside) if weight.requires_grad]
        return ops.LogitsHead(project, self.weight.shape[0], trained, table, self.softcap, self.vocabulary)

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        cap = "" if self.softcap is None else f", softcap={self.softcap:g}"
        return f"in_features={in_features}, out_features={out_features}, tied to embed_tokens{cap}"


class Score(ParamModule):
    """One number of a row: what a reward model has beside the head. Adapters have no part in it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(1, width))

    def forward(self, x_BD):
        return ops.linear(ops.in_dtype_of(x_BD, self.weight), self.weight)

    def extra_repr(self):
        return f"in_features={self.weight.shape[1]}, out_features=1"


class RMSNorm(ParamModule):
    """Division by the root mean square, then by channel times `1 + weight`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = Parameter(ops.new_weight(width))
        self.eps = eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LayerNorm(ParamModule):
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

"""Tensor parallelism and FSDP of a finished module, from outside: a placement by parameter names, applied.

A weight is a DTensor at rest and a plain local tensor in the forward of the module that owns it: hooks put the one in
place of the other, and communicate. Modules and ops see smaller arrays and nothing else.

A *region* is a module whose last projection is divided by inputs and the others by outputs, such as attention by heads
or a feed-forward: each rank computes its part of it, with one sum after it and one before it in the backward (Megatron,
arXiv:1909.08053). Weights inside of it that are whole on every rank, as the key of a single head, have a part of their
gradient on each. A projection outside of a region divides and gathers by itself, so that any layout computes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Divided
from torch.nn import Module, Parameter

from gemkit.errors import ConfigError, TrainingError
from gemkit.nn import LanguageModel
from gemkit.nn.decoder import Attention
from gemkit.nn.layers import Embedding, Head, LoRAHost, ParamModule, Projection
from gemkit.ops import Quantized
from gemkit.parallel import collectives
from gemkit.parallel.collectives import VocabularyShard
from gemkit.parallel.layout import Placement
from gemkit.parallel.mesh import Mesh

MODEL = "model"


def device_mesh(mesh: Mesh, zero: int, device: str = "cpu") -> DeviceMesh:
    """A mesh as torch has it, of the axes "pod" (replicas), "batch" (along which FSDP divides) and "model".

    Args:
        zero: 0 makes of all data parallelism replicas: nothing is divided then but by the model axis.
    """
    pods, batch = mesh.size("pod"), mesh.size("batch")
    shape = (pods, batch) if zero else (pods * batch, 1)
    return init_device_mesh(device, (*shape, mesh.size(MODEL)), mesh_dim_names=("pod", "batch", MODEL))


class Parts:
    """A module of which this process computes a part and holds a part: the placement, applied.

    Args:
        module: its dense weights may be on the meta device, and stay there until `fill` gives them their part; others
            are cut, adapters among them.
        placement: by parameter names.
        mesh: of `device_mesh`.
        quantized: names of the weights that `fill` will give in block types: they are no parameters.

    Raises:
        ConfigError: for an adapter that cannot be divided with its weight, or a layout that leaves out half of a pair.
    """

    def __init__(self, module: LanguageModel, placement: Placement, mesh: DeviceMesh, quantized: Collection[str] = ()):
        self.module, self.mesh, self.whole_mesh = module, mesh[MODEL], mesh
        self.group, self.rank, self.ranks = self.mesh.get_group(), self.mesh.get_local_rank(), self.mesh.size()
        self.shapes = {name: placed.shape for name, placed in placement.weights.items()}
        self.dims: dict[str, int | None] = {}
        self.rows: dict[str, list[int] | None] = {}  # of a weight that is whole: those that are computed with here
        for name, placed in placement.weights.items():
            shards = [shard for shard in placed.shards if shard.axis == MODEL]
            self.dims[name] = shards[0].dim if shards else None
        for name in quantized:
            path, _, leaf = name.rpartition(".")
            del module.get_submodule(path)._parameters[leaf]
        table, head = module.decoder.embed_tokens, module.decoder.lm_head
        if "weight" not in table._parameters:
            head._parameters.pop("weight", None)
        if self.ranks > 1:
            self._divide_all(table, head)

    def dim(self, path: str) -> int | None:
        """The dimension that the weight of a module is divided along."""
        return self.dims.get(f"{path}.weight")

    def _divide_all(self, table: Embedding, head: Head) -> None:
        if self.module.replaced:
            raise ConfigError(f"modules_to_save along {MODEL!r}: weights that adapters exchange are not divided")
        owners = {path: m for path, m in self.module.named_modules() if isinstance(m, ParamModule)}
        regions = self._regions(owners)
        for path in regions:
            self.module.get_submodule(path).register_forward_pre_hook(self._enters)
        for path, owner in owners.items():
            if owner not in (table, head) and ".adapters." not in path:
                self._divide(path, owner, inside=any(path.startswith(f"{region}.") for region in regions))
        self._divide_table(next(path for path, m in owners.items() if m is table), table, head)

    def _regions(self, owners: dict[str, ParamModule]) -> list[str]:
        """Modules whose projections are divided by outputs, and the last of them by inputs."""
        found = []
        for path, owner in owners.items():
            parent = path.rpartition(".")[0]
            if isinstance(owner, Projection) and self.dim(path) == 1:
                beside = [p for p in owners if p.rpartition(".")[0] == parent and p != path]
                if any(self.dim(p) == 0 for p in beside) and all(self.dim(p) != 1 for p in beside):
                    found.append(parent)
        return found

    def fill(self, name: str, value: Tensor | Quantized) -> None:
        """Take of a whole weight the part that is held here."""
        if isinstance(value, Quantized):
            self.module.set_param(name, self._cut_quantized(name, value))
            return
        own = self.module.get_param(name)
        with torch.no_grad():
            copy_part(own, value)

    def shard(self, zero: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """FSDP2 along the data axes: each decoder block is a unit, and what is left is one.

        Trained weights are float32 at rest, the masters that AdamW changes, and gathered in `dtype`; their gradients
        are reduced in float32. Meta weights become memory that waits for `fill`.

        Args:
            zero: 3 divides weights, gradients and optimizer state (arXiv:1910.02054), 2 leaves weights gathered between
                forward and backward, 1 adds up gradients whole over the parts of a step, 0 divides nothing.
        """
        module = self.module
        mesh = self.whole_mesh["pod", "batch"] if self.whole_mesh["pod"].size() > 1 else self.whole_mesh["batch"]
        for owner in module.modules():
            for leaf, value in owner._parameters.items():
                if value is not None and value.is_meta:
                    kept = torch.float32 if value.requires_grad else dtype
                    owner._parameters[leaf] = Parameter(value.detach().to(kept), requires_grad=value.requires_grad)
        _tie(module)
        adapted = any(isinstance(m, LoRAHost) and m.adapters is not None for m in module.modules())
        gathered_in = None if adapted or dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(gathered_in, torch.float32, cast_forward_inputs=False)
        units: list[Any] = [*module.decoder.layers]
        if module.score is not None:
            fully_shard(module.score, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
        _tie(module)

    # ── one module ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _divide(self, path: str, owner: ParamModule, *, inside: bool) -> None:
        dim = self.dim(path)
        rows = self.rows[f"{path}.weight"] = self._heads_of(path) if inside and dim is None else None
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is not None:
                self._put(owner, leaf, parameter, self.dims.get(f"{path}.{leaf}"))
        if isinstance(owner.__dict__.get("weight"), Quantized):
            owner.weight = self._cut_quantized(f"{path}.weight", owner.weight)
        if dim is not None and not isinstance(owner, Projection) and not inside:
            raise ConfigError(f"{path} is divided, and the projections beside it are not: give them a rule as well")
        sums = dim == 1 and isinstance(owner, Projection)
        # the bias of a sum is added once, outside of the region
        self._show(owner, partial=inside, rows=rows, hidden=("bias",) if sums else ())
        if isinstance(owner, Projection):
            self._communicate(owner, dim, inside)
        if isinstance(owner, LoRAHost) and owner.adapters is not None:
            for adapter in owner.adapters.values():
                self._divide_adapter(path, adapter, dim, inside=inside or dim is not None, rows=rows)

    def _divide_adapter(self, path: str, adapter: Any, dim: int | None, *, inside: bool, rows: Any) -> None:
        kind = type(adapter).__name__
        if kind != "LoRA" or adapter.per_head:
            raise ConfigError(f"{path} is divided along {MODEL!r}, and beside it is a {kind}: only a plain LoRA can be")
        for low, divided in ((adapter.lora_A, dim == 1), (adapter.lora_B, dim == 0)):
            for leaf, parameter in list(low._parameters.items()):
                if parameter is not None:
                    self._put(low, leaf, parameter, (1 if low is adapter.lora_A else 0) if divided else None)
            self._show(low, partial=inside, rows=rows if low is adapter.lora_B else None)

    def _put(self, owner: Module, leaf: str, parameter: Tensor, dim: int | None) -> None:
        """A DTensor in place of a parameter."""
        placements = [Replicate() if dim is None else Divided(dim)]
        made = distribute_tensor(parameter.detach(), self.mesh, placements, src_data_rank=None)
        if dim is not None and made.device.type != "meta":  # a piece of its own, so that the whole can go
            local = made.to_local().clone()
            made = DTensor.from_local(local, self.mesh, placements, run_check=False)
        owner._parameters[leaf] = Parameter(made, requires_grad=parameter.requires_grad)

    def _cut_quantized(self, name: str, weight: Quantized) -> Quantized:
        dim, rows = self.dims.get(name), self.rows.get(name)
        planes = {}
        if dim == 1:
            columns = weight.shape[1] // self.ranks
            if weight.shape[1] % self.ranks or columns % (weight.kind.superblock or max(weight.kind.group, 32)):
                raise ConfigError(
                    f"{name} has {weight.shape[1]} columns of {weight.kind.name}, whose blocks {self.ranks} ranks "
                    "would cut: take a smaller model axis, or weights that are not quantized"
                )
            for plane, values in weight.planes.items():
                planes[plane] = values.chunk(self.ranks, 1)[self.rank].contiguous()
            return Quantized(weight.kind, planes, (weight.shape[0], columns))
        if dim == 0:
            size = weight.shape[0] // self.ranks
            rows = [*range(self.rank * size, (self.rank + 1) * size)]
        if rows is None or self.ranks == 1:
            return weight
        index = torch.tensor(rows, device=weight.device)
        planes = {plane: values.index_select(0, index) for plane, values in weight.planes.items()}
        return Quantized(weight.kind, planes, (len(rows), weight.shape[1]))

    def _heads_of(self, path: str) -> list[int] | None:
        """Rows of a key or value projection that is whole on every rank, of the heads that this rank's queries use."""
        parent, _, leaf = path.rpartition(".")
        attention = self.module.get_submodule(parent)
        if leaf not in ("k_proj", "v_proj") or not isinstance(attention, Attention):
            return None
        size = attention.head_dim
        heads, kv_heads = (self.shapes[f"{parent}.{name}.weight"][0] // size for name in ("q_proj", "k_proj"))
        here = heads // self.ranks
        used = [n // (heads // kv_heads) for n in range(self.rank * here, (self.rank + 1) * here)]
        each = {used.count(head) for head in used}
        if len(each) == 1:  # every head serves as many of the queries here: else one for each query
            used = [*dict.fromkeys(used)]
        rows = [head * size + i for head in used for i in range(size)]
        return None if rows == [*range(kv_heads * size)] else rows

    # ── hooks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _show(self, owner: Module, *, partial: bool, rows: list[int] | None = None, hidden: tuple[str, ...] = ()):
        """Let the forward of a module read its local weights."""
        grads = [Partial()] if partial else None
        index = None if rows is None else torch.tensor(rows)

        def before(module: Module, _: Any) -> None:
            parameters: dict[str, Any] = module._parameters
            for leaf, value in parameters.items():
                if value is None or leaf in hidden:
                    module.__dict__[leaf] = None
                    continue
                local = self._local(value, leaf, grads if value.placements[0].is_replicate() else None)
                if index is not None:
                    local = local.index_select(0, index.to(local.device))
                module.__dict__[leaf] = local

        def after(module: Module, *_: Any) -> None:
            for leaf in module._parameters:
                module.__dict__.pop(leaf, None)

        owner.register_forward_pre_hook(before)
        owner.register_forward_hook(after, always_call=True)  # recomputing for a gradient ends by an exception

    def _local(self, value: Any, leaf: str, grads: list[Any] | None) -> Tensor:
        if value.device_mesh != self.mesh:  # a part of it alone is here, as FSDP keeps it between forwards
            raise TrainingError(
                f"a {leaf} is read outside of the model's own forward, where FSDP has not gathered it: "
                'call model(batch, output="hidden") or another output, never a part of the model'
            )
        return value.to_local(grad_placements=grads)

    def _enters(self, _: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return collectives.enter(inputs[0], self.group), *inputs[1:]

    def _communicate(self, owner: Projection, dim: int | None, inside: bool) -> None:
        if dim is None:
            return

        def before(_: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            move = collectives.enter if dim == 0 else collectives.cut
            return move(inputs[0], self.group), *inputs[1:]

        def after(module: Any, _: Any, y_TO: Tensor) -> Tensor:
            if dim == 0:
                return collectives.gather(y_TO, self.group)
            y_TO = collectives.sum_parts(y_TO, self.group)
            bias = module._parameters.get("bias")
            return y_TO if bias is None else y_TO + self._local(bias, "bias", None)

        if not inside:
            owner.register_forward_pre_hook(before)
        if dim == 1 or not inside:
            owner.register_forward_hook(after)

    # ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _divide_table(self, path: str, table: Embedding, head: Head) -> None:
        dim = self.dim(path)
        if dim is not None and (table.adapters is not None or head.adapters is not None):
            raise ConfigError(f"{path} is divided along {MODEL!r}, and has adapters: use a layout that leaves it whole")
        if (weight := table._parameters.get("weight")) is not None:
            self._put(table, "weight", weight, dim)
            _tie(self.module)
        self._show(table, partial=False)
        self._show(head, partial=False)
        if dim == 0:
            rows = self.shapes[f"{path}.weight"][0] // self.ranks
            self._divide_vocabulary(table, head, VocabularyShard(self.rank * rows, rows, self.group))
        elif dim == 1:
            table.register_forward_hook(lambda *given: collectives.gather(given[2], self.group))  # type: ignore[arg-type]
            owner: Any = head
            whole = head.project
            owner.project = lambda x_TI: collectives.sum_parts(whole(collectives.cut(x_TI, self.group)), self.group)

    def _divide_vocabulary(self, table: Embedding, head: Head, shard: VocabularyShard) -> None:
        head.vocabulary = shard
        here: list[Tensor] = []

        def look_up(_: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            rows_T, here_T = shard.local(inputs[0])
            here[:] = [here_T]
            return rows_T, *inputs[1:]

        def add_up(_: Module, __: Any, x_TD: Tensor) -> Tensor:
            return collectives.sum_parts(x_TD.masked_fill(~here.pop()[..., None], 0.0), self.group)

        def join(_: Module, inputs: tuple[Any, ...], result: Any) -> Any:
            losses = len(inputs) > 1 and inputs[1] is not None
            return result if losses else collectives.gather(result, self.group)

        table.register_forward_pre_hook(look_up)
        table.register_forward_hook(add_up)
        head.register_forward_pre_hook(self._enters)
        head.register_forward_hook(join)


def _tie(module: LanguageModel) -> None:
    table = module.decoder.embed_tokens._parameters.get("weight")
    if table is not None:
        module.decoder.lm_head._parameters["weight"] = table


def copy_part(own: Any, whole: Tensor) -> None:
    """The part of a whole tensor into a DTensor that holds it, or all of it into a plain tensor."""
    if isinstance(own, DTensor):
        part = distribute_tensor(whole.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None)
        own.to_local().copy_(part.to_local())
    else:
        own.copy_(whole)

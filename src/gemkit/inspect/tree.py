"""The module tree of a member from its data alone, as PyTorch would print the module, with what each line weighs.

`str(tree(decoder))` equals `str(nn.Decoder(decoder))` (a test compares them) and needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from gemkit.family import Attention, DecoderConfig, Modality, parameters

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Node:
    """A module: its class, what it says of itself between the parentheses, and what is inside."""

    kind: str
    detail: str = ""
    children: tuple[tuple[str, Node], ...] = ()
    own: int = 0  # parameters that it owns, without its children's
    published: str = ""  # what Hugging Face checkpoints call it, where that differs

    @property
    def count(self) -> int:
        return self.own + sum(child.count for _, child in self.children)

    def __str__(self) -> str:
        return "\n".join(line.text for line in lines(self))


@dataclass(frozen=True)
class Line:
    """One printed line; `count` and `published` are empty on lines that only close or detail a module."""

    text: str
    count: int | None = None  # parameters of everything the line stands for
    published: str = ""


def tree(decoder: DecoderConfig, vision: Modality | None = None) -> Node:
    """The modules of a member, in the order data meets them."""
    shapes = dict(parameters(decoder, vision))
    published = _published(decoder)

    def build(path: str, inside: Shapes) -> Node:
        """The module at `path`; `inside` are its parameters, named from it."""
        name = path.rpartition(".")[2]
        groups: dict[str, Shapes] = {}
        for key, shape in inside.items():
            child, dot, rest = key.partition(".")
            if dot:
                groups.setdefault(child, {})[rest] = shape
        children = [(child, build(f"{path}.{child}".lstrip("."), within)) for child, within in groups.items()]
        own = {key: shape for key, shape in inside.items() if "." not in key}
        if "embed_tokens" in groups:
            head = f"in_features={decoder.width}, out_features={decoder.vocab_size}, tied to embed_tokens"
            if decoder.final_softcap is not None:
                head += f", softcap={decoder.final_softcap:g}"
            children.append(("lm_head", Node("Head", head)))
        kind, detail = _class_of(name, groups, own, decoder, vision)
        if kind == "Attention":
            detail = _attention(decoder, int(path.split(".")[-2]))
        renamed = published.get(path.removeprefix("language_model."), "")
        return Node(kind, detail, tuple(children), sum(prod(shape) for shape in own.values()), renamed)

    return build("", shapes)


def lines(node: Node, by_kind: bool = False) -> list[Line]:
    """The printed lines of a tree.

    Args:
        by_kind: gather all equal layers under one line, wherever they are; else only neighbours, as PyTorch does.
    """
    return list(_lines(node, "", "", by_kind, 1))


def _lines(node: Node, label: str, indent: str, by_kind: bool, times: int) -> Iterator[Line]:
    repeated = f"{times} x " if times > 1 else ""
    opening = f"{indent}{label}{repeated}{node.kind}("
    if not node.children:
        yield Line(f"{opening}{node.detail})", node.count * times, node.published)
        return
    yield Line(opening, node.count * times, node.published)
    inner = indent + "  "
    if node.detail:
        yield Line(inner + node.detail)
    for name, child, same in _gathered(node, by_kind):
        yield from _lines(child, f"({name}): ", inner, by_kind, same)
    yield Line(indent + ")")


def _gathered(node: Node, by_kind: bool) -> Iterator[tuple[str, Node, int]]:
    """Label, module and number of each group of equal children; only the members of a list are ever gathered."""
    if node.kind != "ModuleList":
        for name, child in node.children:
            yield name, child, 1
        return
    groups: list[tuple[Node, list[int]]] = []
    for name, child in node.children:
        candidates = groups if by_kind else groups[-1:]
        found = next((indices for other, indices in candidates if other == child), None)
        if found is None:
            groups.append((child, found := []))
        found.append(int(name))
    for child, indices in groups:
        yield _ranges(indices), child, len(indices)


def _ranges(indices: list[int]) -> str:
    """`0-4, 6-10, ..., 30-33` for ascending numbers."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])


def _attention(decoder: DecoderConfig, i: int) -> str:
    mixer = decoder.layers[i].mixer
    assert isinstance(mixer, Attention)
    return "global" if mixer.window is None else f"sliding, window={mixer.window}"


_CONTAINERS = {
    "self_attn": "Attention",
    "mlp": "MLP",
    "recurrent": "Recurrent",
    "rg_lru": "RGLRU",
    "layers": "ModuleList",
    "vision_tower": "Siglip",
    "embeddings": "Embeddings",
    "encoder": "Encoder",
    "multi_modal_projector": "Projector",
    "language_model": "Decoder",
}


def _class_of(
    name: str, groups: dict[str, Shapes], own: Shapes, decoder: DecoderConfig, vision: Modality | None
) -> tuple[str, str]:
    """Class and detail of a module, by its name and by the parameters in it."""
    if groups:
        if name == "":
            return ("Multimodal" if vision else "Decoder"), ""
        if name.isdigit():
            return ("EncoderLayer" if "layer_norm1" in groups else "Block"), ""
        if name in ("self_attn", "mlp") and ("out_proj" in groups or "fc1" in groups):
            return {"self_attn": "EncoderAttention", "mlp": "EncoderMLP"}[name], ""
        return _CONTAINERS[name], ""
    weight = own["weight"]
    if name == "position_embedding":
        return "PositionEmbedding", f"{weight[0]}, {weight[1]}"
    if "embed" in name and len(weight) == 2:
        return "Embedding", f"{weight[0]}, {weight[1]}"
    if len(weight) == 1:
        eps = decoder.norm_eps if vision is None or "bias" not in own else vision.tower.norm_eps
        return ("LayerNorm" if "bias" in own else "RMSNorm"), f"{weight}, eps={eps}"
    if name == "patch_embedding":
        return "PatchEmbedding", f"{weight[1]}, {weight[0]}, patch_size={weight[2]}"
    if name == "conv_1d":
        return "CausalConv1d", f"{weight[0]}, taps={weight[1]}"
    if len(weight) == 3:
        return "BlockDiagonal", f"blocks={weight[0]}, in_features={weight[1]}, out_features={weight[2]}"
    return "Linear", f"in_features={weight[1]}, out_features={weight[0]}, bias={'bias' in own}"


def _published(decoder: DecoderConfig) -> dict[str, str]:
    """Our module path -> what a Hugging Face checkpoint calls it within its layer, where that differs."""
    from gemkit.weights.maps import name_map

    names = name_map("safetensors", decoder)
    renamed = {}
    for ours, _ in parameters(decoder):
        try:
            theirs = names.within(ours)
        except KeyError:
            return {}  # no table for decoders of this layout: its published names are not known
        path, _, leaf = ours.rpartition(".")
        if theirs != ours:
            name = theirs.removesuffix("." + leaf)
            if name == theirs and theirs.endswith("_" + leaf):  # gates are no modules there
                name = theirs.removesuffix(leaf) + "*"
            renamed.setdefault(path, name.split(".", 2)[-1] if name.startswith("layers.") else name)
    return renamed

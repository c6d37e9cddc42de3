"""Adapters on a finished model: low-rank changes beside its weights, which alone are trained (arXiv:2106.09685).

    enable_lora   put new ones beside the weights that names select, and freeze everything else
    attach, save  from and to a folder, as PEFT keeps them (adapters/peft.py)
    set_strength  turn one up, down or off
    merge         add them to the weights (merge.py)
    remove        take one away

Several stand beside one another by name, and each adds its own to what the weights give. What is quantized stays as it
is: gradients run through it (`ops.linear`), and only adapters have any (QLoRA, arXiv:2305.14314).

The table of embeddings is the output table too, in every member. An adapter of `lm_head` changes the logits alone and
one of `embed_tokens` the embeddings alone; merged, either would change both, so that is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict

from gemkit import family
from gemkit.adapters import peft as files
from gemkit.adapters.layers import Adapter, EmbeddingLoRA, LoRA
from gemkit.errors import ConfigError, WeightsError, nearest
from gemkit.family import Prompt
from gemkit.nn import LanguageModel
from gemkit.nn.layers import Embedding, Linear, LoRAHost
from gemkit.ops import Quantized
from gemkit.text.prompts import CHAT_TEMPLATE
from gemkit.weights import hub
from gemkit.weights.export.hf import appearing
from gemkit.weights.load import put_score
from gemkit.weights.maps import NameMap, name_map
from gemkit.weights.model_card import card

Rule = Literal["lora", "keras"]
ALL_LINEAR = "all-linear"
KERAS_TARGETS = ("q_proj", "v_proj")  # of `Backbone.enable_lora`
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Account:
    """What an adapter changes."""

    name: str
    ranks: tuple[int, ...]  # those that there are
    modules: tuple[str, ...]
    before: int  # parameters of the model without adapters, the tied head counted once
    parameters: int  # of this adapter
    trainable: int  # parameters of the whole model that an optimizer may change

    def __str__(self) -> str:
        counts = Counter(name.rpartition(".")[2] for name in self.modules)
        matched = ", ".join(f"{leaf} {count}" for leaf, count in counts.items())
        kind = f"adapter {self.name}: {rank_range(self.ranks)} on {len(self.modules)} modules ({matched})"
        if self.trainable:
            return f"{kind}; of {self.before:,} parameters before, {self.trainable:,} are trained now"
        return f"{kind}, {self.parameters:,} parameters beside {self.before:,}"


def rank_range(ranks: Collection[int]) -> str:
    return "rank " + " to ".join(map(str, sorted({min(ranks), max(ranks)})))


# ── putting adapters in ─────────────────────────────────────────────────────────────────────────────────────────────


def enable_lora(
    module: LanguageModel,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    *,
    rule: Rule = "lora",
    dropout: float = 0.0,
    name: str = "default",
    seed: int = 0,
) -> Account:
    """Put new adapters beside weights, and freeze everything else. The model computes as before until they are trained.

    Args:
        rank: of the change; A is (rank, in), B is (out, rank).
        alpha: the change is multiplied by alpha / rank. None: by 1.
        targets: modules by their names or the ends of these, ours or the published ones ("q_proj", "mlp.up_proj",
            "layers.0.self_attn.q_proj"), with `*` for anything; "all-linear" is every projection of the decoder but the
            head. None: all-linear; of the rule "keras", `q_proj` and `v_proj`. An image tower and the projection
            after it are reached by names that begin with theirs alone: "vision_tower.*".
        rule: "lora" is the published one, with A drawn as PEFT draws it: uniform within 1 / sqrt(in). "keras" is that
            of Keras' `enable_lora`: the heads of `q_proj`, `k_proj` and `v_proj` each have an A of their own and share
            one B, and A is uniform within sqrt(6 / (heads * in)).
        dropout: share of the inputs that is dropped while training; an adapter of the embedding has none to drop.
        name: of the adapter, where there are several.
        seed: of the numbers that are drawn.

    Raises:
        ConfigError: if a target matches nothing, or a setting is out of its range.
    """
    _check_settings(rank, alpha, rule, dropout)
    if rule == "keras" and targets is None:
        targets = KERAS_TARGETS
    table = _table(module)
    owners = owners_of(module)
    chosen = _matching(owners, [ALL_LINEAR] if targets is None else targets, table, module.decoder_path)
    _check_name(module, name)
    heads = {path: _heads(module, path) if rule == "keras" else 1 for path in chosen}
    for path, owner in chosen.items():
        rows, columns = owner.weight.shape
        if rank > min(rows // heads[path], columns):
            of_head = f", {rows // heads[path]} rows a head" if heads[path] > 1 else ""
            raise ConfigError(f"rank={rank} is larger than {path}, which is {rows} x {columns}{of_head}")
    scale = 1.0 if alpha is None else alpha / rank
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, owner in chosen.items():
        adapter = _new(owner, rank, scale, heads[path], dropout)
        _draw(adapter, rule, generator)
        _put(owner, name, adapter)
    return account(module, name)


def _new(owner: LoRAHost, rank: int, scale: float, heads: int, dropout: float) -> Adapter:
    with torch.device(owner.weight.device):
        if isinstance(owner, Embedding):
            return EmbeddingLoRA(owner, rank, scale)
        rows, columns = owner.weight.shape
        return LoRA(columns, rows, rank, scale, heads=heads, dropout=dropout)


def _draw(adapter: Adapter, rule: Rule, generator: torch.Generator) -> None:
    """The first numbers: B A is zero."""
    if isinstance(adapter, EmbeddingLoRA):  # A is zero and B is drawn: a token that is never seen keeps a zero row
        weight = adapter.lora_B.weight
        drawn = torch.randn(weight.shape, generator=generator)
    else:
        weight = adapter.lora_A.weight
        columns = weight.shape[1]
        # he_uniform counts the inputs of a kernel (heads, in, rank) as heads * in
        bound = math.sqrt(6 / (adapter.heads * columns)) if rule == "keras" else columns**-0.5
        drawn = (2 * torch.rand(weight.shape, generator=generator) - 1) * bound
    with torch.no_grad():
        weight.copy_(drawn)


def _put(owner: LoRAHost, name: str, adapter: Adapter) -> None:
    if owner.adapters is None:
        owner.adapters = ModuleDict()
    owner.adapters[name] = adapter.train(owner.training)


def _check_settings(rank: int, alpha: float | None, rule: str, dropout: float) -> None:
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank={rank!r} must be a whole number from 1")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha!r} must be more than 0; None is the rank itself")
    if rule not in ("lora", "keras"):
        raise ConfigError(f"rule={rule!r} is not one of lora, keras")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout!r} must be from 0 to less than 1")


def _check_name(module: LanguageModel, name: str) -> None:
    if not _NAME.fullmatch(name) or hasattr(ModuleDict, name):
        raise ConfigError(f"name={name!r} cannot name an adapter: letters, digits, _ and - are used, such as default")
    if name in names(module):
        raise ConfigError(f"there is an adapter {name!r} already: remove it first, or give another name")


def _heads(module: LanguageModel, path: str) -> int:
    """Heads that Keras gives an A each: its query, key and value kernels are (heads, in, head size)."""
    leaf = path.rpartition(".")[2]
    if not path.startswith(module.decoder_path) or leaf not in ("q_proj", "k_proj", "v_proj"):
        return 1
    attention: Any = module.get_submodule(path.rpartition(".")[0])
    return getattr(attention, leaf).weight.shape[0] // attention.head_dim


def _matching(
    owners: Mapping[str, LoRAHost], targets: str | Sequence[str], table: NameMap, decoder_path: str
) -> dict[str, LoRAHost]:
    """The modules that targets select, in the order data meets them."""
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ConfigError("targets=[] selects nothing: leave it out for every projection of the decoder")
    found: set[str] = set()
    for target in targets:
        matched = [path for path, owner in owners.items() if _matches(path, owner, target, table, decoder_path)]
        if not matched:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in owners))
            inside = all(path.startswith(decoder_path) for path in owners)
            tower = "" if inside else "; of the image tower only what begins with vision_tower."
            raise ConfigError(f"target {target!r} matches nothing; there is {', '.join(leaves)}{tower}")
        found.update(matched)
    return {path: owner for path, owner in owners.items() if path in found}


def _matches(path: str, owner: LoRAHost, target: str, table: NameMap, decoder_path: str) -> bool:
    outside = not path.startswith(decoder_path)  # only a target that says so reaches a tower
    if target == ALL_LINEAR:
        return isinstance(owner, Linear) and not outside
    if outside and not target.startswith(path.partition(".")[0]):
        return False
    return any(fnmatchcase(name, target) or fnmatchcase(name, "*." + target) for name in (path, *table.modules(path)))


def _table(module: LanguageModel) -> NameMap:
    return name_map("safetensors", module.config, module.vision)


def owners_of(module: Module) -> dict[str, LoRAHost]:
    """Everything that can have adapters, by its name; those of adapters themselves are not among them."""
    found = module.named_modules()
    return {path: owner for path, owner in found if isinstance(owner, LoRAHost) and ".adapters." not in path}


# ── what there is ───────────────────────────────────────────────────────────────────────────────────────────────────


def names(module: LanguageModel) -> list[str]:
    """The adapters that a model has, merged ones included, in the order in which they came."""
    return list(dict.fromkeys(name for _, name, _ in _all(module)))


def merged(module: LanguageModel) -> list[str]:
    """Those of them that are in the weights now."""
    return list(dict.fromkeys(n for owner in owners_of(module).values() if owner.merged for n in owner.merged.names))


def _all(module: LanguageModel) -> Iterator[tuple[str, str, Any]]:
    """(module, name of the adapter, adapter) of every one."""
    for path, owner in owners_of(module).items():
        held = dict(owner.merged.adapters.items()) if owner.merged else {}
        held |= dict(owner.adapters.items()) if owner.adapters is not None else {}
        for name, adapter in held.items():
            yield path, name, adapter


def adapters_of(module: LanguageModel, name: str | None) -> dict[str, Any]:
    """The adapters of a name, by module. None: of the only name that there is.

    Raises:
        ConfigError: if there is none, or it must be said which.
    """
    known = names(module)
    if not known:
        raise ConfigError("the model has no adapter: enable_lora or load_adapter makes one")
    if name is None and len(known) > 1:
        raise ConfigError(f"the model has the adapters {', '.join(known)}: say which by name")
    name = known[0] if name is None else name
    if name not in known:
        raise ConfigError(f"there is no adapter {name!r}; {nearest(name, known)}")
    return {path: adapter for path, held, adapter in _all(module) if held == name}


def account(module: LanguageModel, name: str | None = None) -> Account:
    """What an adapter changes."""
    of = adapters_of(module, name)
    name = name or names(module)[0]
    before = sum(math.prod(shape) for _, shape in family.parameters(module.config, module.vision))
    return Account(
        name,
        tuple(sorted({adapter.rank for adapter in of.values()})),
        tuple(of),
        before,
        sum(p.numel() for adapter in of.values() for p in adapter.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
    )


def set_strength(module: LanguageModel, strength: float, name: str | None = None) -> None:
    """Let an adapter count more or less than it was trained to: 1 is as it was, 0 is off. It is not saved.

    Raises:
        ConfigError: if the adapter is merged.
    """
    of = adapters_of(module, name)
    name = name or names(module)[0]
    if not math.isfinite(strength):
        raise ConfigError(f"strength={strength!r} must be a number")
    if name in merged(module):
        raise ConfigError(f"the adapter {name!r} is merged into the weights: unmerge first")
    for adapter in of.values():
        adapter.strength = float(strength)


def remove(module: LanguageModel, name: str | None = None) -> None:
    """Take an adapter away.

    Raises:
        ConfigError: if there is none of that name, or it is merged.
    """
    of = adapters_of(module, name)
    name = name or names(module)[0]
    if name in merged(module):
        raise ConfigError(f"the adapter {name!r} is merged into the weights: unmerge first")
    owners = owners_of(module)
    for path in of:
        for held in (owners[path].adapters, owners[path].merged and owners[path].merged.adapters):
            if held and name in held:
                del held[name]
        if not owners[path].adapters:
            owners[path].adapters = None


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def attach(
    module: LanguageModel, folder: str | os.PathLike[str], name: str | None = None, *, trainable: bool = False
) -> Account:
    """Put an adapter from a folder beside the weights.

    Args:
        name: None takes the folder's, with a number behind it if there is one of that name.
        trainable: train it further, and freeze everything else.

    Raises:
        WeightsError: if it is damaged, of a kind that is not read here, or another model's.
        ConfigError: if there is an adapter of that name.
    """
    if name is None:
        name = _free_name(module, Path(folder))
    _check_name(module, name)
    owners = owners_of(module)
    shapes = {path: tuple(owner.weight.shape) for path, owner in owners.items()}
    changes, copies = files.read(folder, shapes, _table(module))
    score = copies.pop("score", None)
    for path, copy in copies.items():
        _check_copy(folder, path, copy, owners[path].weight)
    if trainable:
        module.requires_grad_(False)
    if score is not None:
        put_score(module, score)
    for change in changes:
        owner = owners[change.module]
        adapter = _new(owner, change.rank, change.scale, change.heads, change.dropout)
        a = change.a.T if isinstance(adapter, EmbeddingLoRA) else change.a
        with torch.no_grad():
            adapter.lora_A.weight.copy_(a)
            adapter.lora_B.weight.copy_(change.b)
        _put(owner, name, adapter.requires_grad_(trainable))
    return account(module, name)


def _free_name(module: LanguageModel, folder: Path) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", hub.named(folder)).strip("-")[:50] or "adapter"
    if hasattr(ModuleDict, stem):
        stem += "-adapter"
    taken, name, number = names(module), stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def _check_copy(folder: Any, path: str, copy: Tensor, weight: Tensor | Quantized) -> None:
    """PEFT stores tables that adapters stand beside. Where rows were trained or added, the adapter is not all."""
    if tuple(copy.shape) == tuple(weight.shape):
        if isinstance(weight, Quantized):
            # rounded to codes here, and not there: the first rows tell another table from a rounded one
            ours, theirs = weight.narrow_rows(0, min(64, weight.shape[0])).dequantize(), copy[:64].float()
            same = (ours - theirs).norm() < 0.2 * theirs.norm() + 1e-6
        else:
            same = torch.equal(copy.to(weight.dtype), weight.detach().cpu())
        if same:
            return
    raise WeightsError(
        f"{folder} brings a {path} of its own, {tuple(copy.shape)}, which is not the model's {tuple(weight.shape)}: "
        "its vocabulary was changed or trained too, and what is stored is more than an adapter of this model"
    )


def save(
    module: LanguageModel,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    base: str | None,
    named: str,
    prompts: Collection[Prompt] = (),
    data: Sequence[str] = (),
) -> Path:
    """Write an adapter as PEFT does, with a model card. The folder appears under its name only when it is complete.

    Args:
        base: what the model is opened by again; None is the starter model.
        named: what others know it by: a hub id, or a folder.
        prompts: what the model answers with it: "chat" leaves a chat template beside it.
        data: what it was trained on, for the card.

    Raises:
        ConfigError: if there is no such adapter.
        WeightsError: if it has numbers that are not finite, or the folder exists or cannot be written.
    """
    adapters_of(module, name)
    name = name or names(module)[0]
    with appearing(folder) as work:
        write(module, work, name, base=base, named=named)
        lines = [f"What is here: {_what(module, name)}"]
        text = card(Path(folder).expanduser().resolve().name, named, lines, adapter=True, data=data)
        (work / "README.md").write_text(text, encoding="utf-8")
        if "chat" in prompts:
            (work / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return Path(folder).expanduser()


def merged_card(module: LanguageModel, title: str, named: str, data: Sequence[str] = ()) -> str:
    """The model card of a model that adapters are merged into."""
    lines = [f"Merged into its weights: {_what(module, name)}" for name in merged(module)]
    return card(title, named, lines, adapter=False, data=data)


def _what(module: LanguageModel, name: str) -> str:
    told = account(module, name)
    leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in told.modules))
    by_head = any(adapter.heads > 1 for adapter in adapters_of(module, name).values())
    rule = " by the rule of Keras' enable_lora," if by_head else ""
    return f"{name}, a LoRA of {rank_range(told.ranks)},{rule} {told.parameters:,} parameters, on {leaves}."


def write(module: LanguageModel, folder: Path, name: str, *, base: str | None, named: str) -> None:
    """The two files of an adapter, into a folder that exists: for a checkpoint that has its own way to be complete.

    Raises:
        WeightsError: if it has numbers that are not finite.
    """
    changes = []
    for path, adapter in adapters_of(module, name).items():
        a, b = adapter.lora_A.weight.detach(), adapter.lora_B.weight.detach()
        a = a.T if isinstance(adapter, EmbeddingLoRA) else a
        changes.append(files.LowRank(path, a, b, adapter.scale, adapter.heads, adapter.dropout))
    score = module.score
    files.write(
        folder,
        changes,
        owners_of(module),
        _table(module),
        base=base,
        named=named,
        text_only=module.vision is None,
        score=None if score is None else score.weight,
    )

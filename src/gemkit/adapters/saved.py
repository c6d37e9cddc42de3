"""Adapters from a folder to a model and back, as PEFT keeps them (`peft.py` has the files)."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemkit import family
from gemkit.adapters import peft, replaced
from gemkit.adapters.layers import EmbeddingLoRA, LowRank
from gemkit.adapters.lora import new_low_rank, put_token_rows
from gemkit.adapters.registry import (
    Account,
    account,
    adapters_of,
    expect_free,
    free_name,
    merged,
    name_of,
    put,
    rank_range,
)
from gemkit.adapters.targets import is_tied, owners_of, table_of
from gemkit.errors import ConfigError, WeightsError
from gemkit.family import Prompt
from gemkit.nn import LanguageModel
from gemkit.nn.layers import LoRAHost
from gemkit.ops import Quantized
from gemkit.text.prompts import CHAT_TEMPLATE
from gemkit.weights.export.hf import appearing
from gemkit.weights.load import put_score
from gemkit.weights.maps import Part
from gemkit.weights.model_card import card


def attach(
    module: LanguageModel, folder: str | os.PathLike[str], name: str | None = None, *, trainable: bool = False
) -> Account:
    """Put an adapter from a folder beside the weights.

    Args:
        name: None takes the folder's, with a number behind it if there is one of that name.
        trainable: train it further, and freeze everything else.

    Raises:
        WeightsError: if it is damaged, of a kind that is not read here, or another model's.
        ConfigError: if there is an adapter of that name, or one that brings the same weight whole.
    """
    if name is None:
        name = free_name(module, Path(folder))
    expect_free(module, name)
    owners = owners_of(module)
    shapes = {path: tuple(owner.weight.shape) for path, owner in owners.items()}
    contents = peft.read(folder, shapes, _parts(module), table_of(module))
    _take_copies(folder, owners, contents)
    if trainable and contents.tied and any(path.endswith("lm_head") for path in _modules(contents)):
        raise ConfigError(
            f"{folder} keeps the adapters of embed_tokens and lm_head equal (ensure_weight_tying), which training them "
            "here would not: train it further with PEFT, or start anew with trainable_tokens or modules_to_save"
        )
    changes = [
        _beside_the_whole(folder, contents.taken_out, change, owners[change.module]) for change in contents.changes
    ]
    _expect_new_tokens(module, name, contents)
    if trainable:
        module.requires_grad_(False)
    if contents.score is not None:
        put_score(module, contents.score)
    replaced.put(module, name, _as_one(contents.whole), trainable=trainable)
    for change in changes:
        put(owners[change.module], name, _filled(owners[change.module], change).requires_grad_(trainable))
    put_token_rows(module, name, _rows(module, contents), trainable=trainable)
    return account(module, name)


def _modules(contents: peft.Contents) -> list[str]:
    return [change.module for change in contents.changes]


def _parts(module: LanguageModel) -> list[Part]:
    shapes = dict(family.parameters(module.config, module.vision))
    return table_of(module).parts(module.config, shapes)


def _filled(owner: LoRAHost, change: peft.LowRankChange) -> LowRank:
    dora, bias = change.magnitude is not None, change.bias is not None
    adapter = new_low_rank(owner, change.rank, change.scale, change.heads, change.dropout, dora=dora, bias=bias)
    with torch.no_grad():
        adapter.lora_A.weight.copy_(change.a.T if isinstance(adapter, EmbeddingLoRA) else change.a)
        adapter.lora_B.weight.copy_(change.b)
        if change.magnitude is not None:
            adapter.magnitude.copy_(change.magnitude)
        if change.bias is not None:
            adapter.lora_B.bias.copy_(change.bias)
    return adapter


def _beside_the_whole(
    folder: Any, taken_out: str | None, change: peft.LowRankChange, owner: LoRAHost
) -> peft.LowRankChange:
    """The change of PiSSA (arXiv:2404.02948) or OLoRA (arXiv:2406.01775), which took a part of rank r out of the
    weight, beside the whole weight: A and B with those of that part below, subtracted. PEFT takes it out each time it
    loads one, and saves such a pair of double rank when it is told to convert an adapter."""
    if taken_out is None or change.module.endswith("embed_tokens"):  # which these ways to begin leave alone
        return change
    where = f"{folder}: init_lora_weights={taken_out!r} takes a part out of {change.module}"
    if change.module.endswith("lm_head"):
        raise WeightsError(f"{where}, which is the table of embeddings too: PEFT would change these with it")
    if isinstance(owner.weight, Quantized):
        raise WeightsError(
            f"{where}, which is quantized ({owner.weight.kind.name}): load the model dense (quantized=False), or "
            "convert the adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    weight, rank = owner.weight.detach().float(), change.rank
    if taken_out == "pissa":
        left, lengths, right = torch.linalg.svd(weight, full_matrices=False)
        a, b = right[:rank], left[:, :rank] * lengths[:rank]
    else:
        left, right = torch.linalg.qr(weight)
        a, b = right[:rank] * change.scale, left[:, :rank]
    a, b = a.to(change.a.device), b.to(change.b.device) / change.scale
    return replace(change, a=torch.cat([change.a, a]), b=torch.cat([change.b, -b], 1))


def _as_one(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where the table and the head are brought with the same numbers, they are one tensor."""
    table, head = (
        next((p for p in whole if p.endswith(end)), None) for end in ("embed_tokens.weight", "lm_head.weight")
    )
    if table and head and torch.equal(whole[table], whole[head]):
        return whole | {head: whole[table]}
    return whole


def _rows(module: LanguageModel, contents: peft.Contents) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Rows by where they belong. Those of the table are the head's too, if it is tied and has none of its own."""
    found = {module.rpartition(".")[2]: rows for module, rows in contents.rows.items()}
    if set(found) == {"embed_tokens"} and is_tied(module):
        return {"both": found["embed_tokens"]}
    return found


def _expect_new_tokens(module: LanguageModel, name: str, contents: peft.Contents) -> None:
    """Raises: ConfigError, if another adapter has rows for the same tokens."""
    for path, (ids, _) in contents.rows.items():
        for other, adapter in (owners_of(module)[path].adapters or {}).items():
            if both := set(ids) & set(getattr(adapter, "ids", ())):
                raise ConfigError(f"{name} and {other} each have rows of their own for token {min(both)} of {path}")


def _take_copies(folder: Any, owners: dict[str, LoRAHost], contents: peft.Contents) -> None:
    """PEFT stores tables that adapters stand beside, and loads them over the model's own. Those that are the model's
    are left out; others of the same size take the place of the table and of the head, which are one."""
    for path, copy in contents.copies.items():
        weight = owners[path].weight
        same = tuple(copy.shape) == tuple(weight.shape)
        if same and isinstance(weight, Quantized):
            # rounded to codes here, and not there: the first rows tell another table from a rounded one
            ours, theirs = weight.narrow_rows(0, min(64, weight.shape[0])).dequantize(), copy[:64].float()
            same = bool((ours - theirs).norm() < 0.2 * theirs.norm() + 1e-6)
        elif same and torch.equal(copy.to(weight.dtype), weight.detach().cpu()):
            continue
        elif same:
            tied = {p: owner for p, owner in owners.items() if owner.weight is weight}
            contents.whole |= {f"{p}.weight": copy for p in tied}
            continue
        if not same:
            raise WeightsError(
                f"{folder} brings a {path} of its own, {tuple(copy.shape)}, which is not the model's "
                f"{tuple(weight.shape)}: its vocabulary was changed too; merge it in PEFT, and open the result"
            )


# ── saving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(
    module: LanguageModel,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    base: str | None,
    named: str,
    prompts: Collection[Prompt] = (),
    templates: Mapping[str, str] | None = None,
    data: Sequence[str] = (),
) -> Path:
    """Write an adapter as PEFT does, with a model card. The folder appears under its name only when it is complete.

    Args:
        base: what the model is opened by again; None is the starter model.
        named: what others know it by: a hub id, or a folder.
        prompts: what the model answers with it: "chat" leaves a chat template beside it.
        templates: the "default" one, and others by their names (`prompts.templates_of`); None: the family's.
        data: what it was trained on, for the card.

    Raises:
        ConfigError: if there is no such adapter.
        WeightsError: if it has numbers that are not finite, or the folder exists or cannot be written.
    """
    name = name_of(module, name)
    with appearing(folder) as work:
        write(module, work, name, base=base, named=named)
        lines = [f"What is here: {_what(module, name)}"]
        text = card(Path(folder).expanduser().resolve().name, named, lines, adapter=True, data=data)
        (work / "README.md").write_text(text, encoding="utf-8")
        if "chat" in prompts:
            for label, text in (templates or {"default": CHAT_TEMPLATE}).items():
                more = work / "additional_chat_templates"
                path = work / "chat_template.jinja" if label == "default" else more / f"{label}.jinja"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    return Path(folder).expanduser()


def merged_card(module: LanguageModel, title: str, named: str, data: Sequence[str] = ()) -> str:
    """The model card of a model that adapters are merged into."""
    lines = [f"Merged into its weights: {_what(module, name)}" for name in merged(module)]
    return card(title, named, lines, adapter=False, data=data)


def _what(module: LanguageModel, name: str) -> str:
    told, of = account(module, name), adapters_of(module, name)
    leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in told.modules))
    low_rank = [adapter for adapter in of.values() if isinstance(adapter, LowRank)]
    kind = "DoRA" if any(adapter.magnitude is not None for adapter in low_rank) else "LoRA"
    by_head = any(adapter.heads > 1 for adapter in low_rank)
    rule = " by the rule of Keras' enable_lora," if by_head else ""
    parts = (
        [f"a {kind} of {rank_range(told.ranks)},{rule} {told.parameters:,} parameters, on {leaves}"] if leaves else []
    )
    parts += [f"rows of {told.tokens} tokens"] if told.tokens else []
    parts += [f"{len(told.replaced)} weights trained whole"] if told.replaced else []
    return f"{name}, {', with '.join(parts)}."


def write(module: LanguageModel, folder: Path, name: str, *, base: str | None, named: str) -> None:
    """The two files of an adapter, into a folder that exists: for a checkpoint that has its own way to be complete.

    Raises:
        WeightsError: if it has numbers that are not finite.
    """
    contents = peft.Contents()
    for path, adapter in adapters_of(module, name).items():
        if isinstance(adapter, LowRank):
            contents.changes.append(_change(path, adapter))
        else:
            contents.rows[path] = adapter.ids, adapter.rows.detach()
    tables = [path for path in contents.rows if path.endswith("embed_tokens")]
    if tables and len(contents.rows) == 2:  # the head's are the same, or PEFT takes them for such
        (ids, rows), (head_ids, head_rows) = (contents.rows[path] for path in (tables[0], _head_of(contents.rows)))
        if ids == head_ids and rows.data_ptr() == head_rows.data_ptr():
            contents.rows.pop(_head_of(contents.rows))
    whole = replaced.of(module, name)
    contents.whole = {one.param: one.trained.detach() for one in whole}
    contents.tied = len({id(one.trained) for one in whole}) < len(whole)
    if module.score is not None:
        contents.score = module.score.weight.detach()
    peft.write(
        folder,
        contents,
        owners_of(module),
        _parts(module),
        table_of(module),
        base=base,
        named=named,
        text_only=module.vision is None,
    )


def _change(path: str, adapter: LowRank) -> peft.LowRankChange:
    a, b = adapter.lora_A.weight.detach(), adapter.lora_B.weight.detach()
    a = a.T if isinstance(adapter, EmbeddingLoRA) else a
    bias = None if adapter.lora_B.bias is None else adapter.lora_B.bias.detach()
    magnitude = None if adapter.magnitude is None else adapter.magnitude.detach()
    return peft.LowRankChange(path, a, b, adapter.scale, adapter.heads, adapter.dropout, bias, magnitude)


def _head_of(paths: Collection[str]) -> str:
    return next(path for path in paths if path.endswith("lm_head"))

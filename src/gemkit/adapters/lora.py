"""New adapters on a finished model: low-rank changes beside its weights, which alone are trained (arXiv:2106.09685).

Several stand beside one another by name, and each changes what the weights and those before it give. What is quantized
stays as it is: gradients run through it (`ops.linear`), and only adapters have any (QLoRA, arXiv:2305.14314).

The table of embeddings is the output table too, in every member. An adapter of `lm_head` changes the logits alone and
one of `embed_tokens` the embeddings alone; merged, either would change both, so that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit.adapters import replaced
from gemkit.adapters.layers import DoRA, EmbeddingDoRA, EmbeddingLoRA, HeadRows, LoRA, LowRank, TokenRows
from gemkit.adapters.registry import Account, account, expect_free, put
from gemkit.adapters.targets import ALL_LINEAR, matching, parameters_in
from gemkit.errors import ConfigError
from gemkit.nn import LanguageModel
from gemkit.nn.layers import Embedding, LoRAHost
from gemkit.ops import Quantized
from gemkit.ops.adapters import dora_gain

Rule = Literal["lora", "keras"]
KERAS_TARGETS = ("q_proj", "v_proj")  # of `Backbone.enable_lora`


def enable_lora(
    module: LanguageModel,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
    *,
    rule: Rule = "lora",
    dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    trainable_tokens: Collection[int] = (),
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
        use_dora: train the lengths of the changed weights' rows apart from their directions (arXiv:2402.09353).
        use_rslora: multiply by alpha / sqrt(rank) instead (arXiv:2312.03732); it needs an alpha.
        modules_to_save: modules, named as targets are, that are trained whole and saved with the adapter.
            `embed_tokens` with `lm_head` are trained as one table.
        trainable_tokens: ids whose rows of the table of embeddings, which is the output table too, are trained.
        name: of the adapter, where there are several.
        seed: of the numbers that are drawn.

    Raises:
        ConfigError: if a target matches nothing, or a setting is out of its range.
    """
    _check_settings(rank, alpha, rule, dropout, use_dora, use_rslora)
    if rule == "keras" and targets is None:
        targets = KERAS_TARGETS
    chosen = matching(module, ALL_LINEAR if targets is None else targets)
    expect_free(module, name)
    heads = {path: _heads(module, path) if rule == "keras" else 1 for path in chosen}
    for path, owner in chosen.items():
        rows, columns = owner.weight.shape
        if rank > min(rows // heads[path], columns):
            of_head = f", {rows // heads[path]} rows a head" if heads[path] > 1 else ""
            raise ConfigError(f"rank={rank} is larger than {path}, which is {rows} x {columns}{of_head}")
    ids = _token_ids(module, trainable_tokens)
    whole = parameters_in(module, modules_to_save) if modules_to_save else []
    _expect_apart(chosen, whole, ids)
    scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if use_rslora else rank)
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, owner in chosen.items():
        adapter = new_low_rank(owner, rank, scale, heads[path], dropout, dora=use_dora)
        _draw(adapter, rule, generator)
        if use_dora:
            with torch.no_grad():  # its gain is the magnitude over the length, which is 1 then
                a, b, of_table = adapter.lora_A.weight, adapter.lora_B.weight, isinstance(owner, Embedding)
                ones = torch.ones_like(adapter.magnitude)
                adapter.magnitude.copy_(1 / dora_gain(ones, owner.weight, a, b, scale, of_table))
        put(owner, name, adapter)
    if ids:
        table = module.decoder.embed_tokens.weight
        with torch.no_grad():
            chosen_ids = torch.tensor(ids, device=table.device)
            rows_ND = table.rows(chosen_ids) if isinstance(table, Quantized) else table[chosen_ids]
        put_token_rows(module, name, {"both": (ids, rows_ND)}, trainable=True)
    replaced.put(module, name, _own_weights(module, whole), trainable=True)
    return account(module, name)


def new_low_rank(
    owner: LoRAHost, rank: int, scale: float, heads: int, dropout: float, *, dora: bool = False, bias: bool = False
) -> Any:
    """An adapter for a module, of zeros and on its device."""
    with torch.device(owner.weight.device):
        if isinstance(owner, Embedding):
            return (EmbeddingDoRA if dora else EmbeddingLoRA)(owner, rank, scale)
        rows, columns = owner.weight.shape
        if dora:
            return DoRA(columns, rows, rank, scale, dropout=dropout)
        return LoRA(columns, rows, rank, scale, heads=heads, dropout=dropout, bias=bias)


def put_token_rows(
    module: LanguageModel, name: str, rows: dict[str, tuple[tuple[int, ...], Tensor]], *, trainable: bool
) -> None:
    """Rows of their own for some tokens, in float32.

    Args:
        rows: ascending ids and their rows (N, D), of "embed_tokens", of "lm_head", or of "both" as one parameter.
    """
    decoder = module.decoder
    for where, (ids, values_ND) in rows.items():
        value = values_ND.detach().to(module.device, torch.float32, copy=True)
        parameter = Parameter(value, requires_grad=trainable)
        if where != "lm_head":
            table: Any = decoder.embed_tokens
            put(table, name, TokenRows(ids, parameter, table.scale, table.scale_dtype))
        if where != "embed_tokens":
            put(decoder.lm_head, name, HeadRows(ids, parameter))


def _draw(adapter: LowRank, rule: Rule, generator: torch.Generator) -> None:
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


def _check_settings(
    rank: int, alpha: float | None, rule: str, dropout: float, use_dora: bool, use_rslora: bool
) -> None:
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank={rank!r} must be a whole number from 1")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha!r} must be more than 0; None is the rank itself")
    if rule not in ("lora", "keras"):
        raise ConfigError(f"rule={rule!r} is not one of lora, keras")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout={dropout!r} must be from 0 to less than 1")
    if use_dora and rule == "keras":
        raise ConfigError("use_dora with rule='keras': Keras has no DoRA; leave one of them out")
    if use_rslora and alpha is None:
        raise ConfigError("use_rslora multiplies by alpha / sqrt(rank): give an alpha; without one the change counts 1")


def _token_ids(module: LanguageModel, tokens: Collection[int]) -> tuple[int, ...]:
    rows = module.config.vocab_size
    if wrong := [token for token in tokens if type(token) is not int or not 0 <= token < rows]:
        raise ConfigError(f"trainable_tokens has {wrong[0]!r}, which is no id from 0 to {rows - 1}")
    return tuple(sorted(set(tokens)))


def _expect_apart(chosen: Collection[str], whole: Collection[str], ids: Collection[int]) -> None:
    """Raises: ConfigError, if a weight would be trained in two ways."""
    beside = [*chosen, *(["embed_tokens", "lm_head"] if ids else [])]
    ends = {path.rpartition(".")[2] if "embed_tokens" in path or "lm_head" in path else path for path in beside}
    for param in whole:
        path = param.rpartition(".")[0]
        if path in ends or path.rpartition(".")[2] in ends & {"embed_tokens", "lm_head"}:
            raise ConfigError(f"{path} would be trained whole and have an adapter too: name it in one setting alone")
    if ids and any(path.endswith(("embed_tokens", "lm_head")) for path in chosen):
        raise ConfigError("trainable_tokens and an adapter of the same table: name it in one setting alone")


def _own_weights(module: LanguageModel, params: Sequence[str]) -> dict[str, Tensor]:
    """Copies to be trained. Weights that are one in the model stay one."""
    copies: dict[int, Tensor] = {}
    found = {}
    for param in params:
        own = module.get_param(param)
        if id(own) not in copies:
            copies[id(own)] = own.dequantize() if isinstance(own, Quantized) else own.detach().clone()
        found[param] = copies[id(own)]
    return found


def _heads(module: LanguageModel, path: str) -> int:
    """Heads that Keras gives an A each: its query, key and value kernels are (heads, in, head size)."""
    leaf = path.rpartition(".")[2]
    if not path.startswith(module.decoder_path) or leaf not in ("q_proj", "k_proj", "v_proj"):
        return 1
    attention: Any = module.get_submodule(path.rpartition(".")[0])
    return getattr(attention, leaf).weight.shape[0] // attention.head_dim

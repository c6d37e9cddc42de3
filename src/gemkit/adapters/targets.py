"""The modules of a model that can have adapters, and which of them names select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch.nn import Module

from gemkit.errors import ConfigError
from gemkit.nn import LanguageModel
from gemkit.nn.layers import Linear, LoRAHost
from gemkit.weights.maps import NameMap, name_map

ALL_LINEAR = "all-linear"


def table_of(module: LanguageModel) -> NameMap:
    """Transformers' names of a model's modules and parameters."""
    return name_map("safetensors", module.config, module.vision)


def owners_of(module: Module) -> dict[str, LoRAHost]:
    """Everything that can have adapters, by its name; those of adapters themselves are not among them."""
    found = module.named_modules()
    return {path: owner for path, owner in found if isinstance(owner, LoRAHost) and ".adapters." not in path}


def matching(module: LanguageModel, targets: str | Sequence[str]) -> dict[str, LoRAHost]:
    """The modules that targets select, in the order data meets them.

    Raises:
        ConfigError: if a target selects none.
    """
    owners = owners_of(module)
    found = _selected(module, list(owners), targets, "targets", "every projection of the decoder", owners)
    return {path: owner for path, owner in owners.items() if path in found}


def parameters_in(module: LanguageModel, names: Sequence[str]) -> list[str]:
    """The parameters of the modules that names select, each with all that it holds.

    Raises:
        ConfigError: if a name selects none.
    """
    held: dict[str, list[str]] = {}
    for param, _ in module.named_parameters():
        if ".adapters." not in param:
            parts = param.split(".")[:-1]
            for end in range(len(parts)):
                held.setdefault(".".join(parts[: end + 1]), []).append(param)
    held[module.decoder_path + ("." if module.decoder_path else "") + "lm_head"] = []
    found = _selected(module, list(held), names, "modules_to_save", "nothing", {})
    params = {param for path in found for param in held[path] or [f"{path}.weight"]}
    return sorted(params)


def _selected(
    module: LanguageModel,
    paths: Sequence[str],
    targets: str | Sequence[str],
    setting: str,
    otherwise: str,
    owners: Mapping[str, LoRAHost],
) -> set[str]:
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ConfigError(f"{setting}=[] selects nothing: leave it out for {otherwise}")
    table, decoder_path = table_of(module), module.decoder_path
    found: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR and owners:
            matched = [p for p, owner in owners.items() if isinstance(owner, Linear) and p.startswith(decoder_path)]
        else:
            matched = [path for path in paths if _matches(path, target, table, decoder_path)]
        if not matched:
            leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            inside = all(path.startswith(decoder_path) for path in paths)
            tower = "" if inside else "; of the image tower only what begins with vision_tower."
            kind = "target" if setting == "targets" else setting
            raise ConfigError(f"{kind} {target!r} matches nothing; there is {', '.join(leaves)}{tower}")
        found.update(matched)
    return found


def _matches(path: str, target: str, table: NameMap, decoder_path: str) -> bool:
    outside = not path.startswith(decoder_path)  # only a target that says so reaches a tower
    if outside and not target.startswith(path.partition(".")[0]):
        return False
    try:
        names = (path, *table.modules(path))
    except KeyError:  # no module with a weight of its own, but one that holds some
        names = (path,)
    return any(fnmatchcase(name, target) or fnmatchcase(name, "*." + target) for name in names)


def is_tied(module: LanguageModel) -> bool:
    """Whether the output table is the table of embeddings, whatever adapters have put in their places."""
    own = {one.param: one.own for one in module.replaced}
    path = f"{module.decoder_path}." if module.decoder_path else ""
    table, head = (f"{path}{leaf}.weight" for leaf in ("embed_tokens", "lm_head"))
    return own.get(table, module.decoder.embed_tokens.weight) is own.get(head, module.decoder.lm_head.weight)

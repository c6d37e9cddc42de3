"""The ways to learn, one file each, and how an experiment becomes one of them.

pretrain.py    the next token of plain text; the base of all that is a weighted cross-entropy
infill.py      what belongs between the beginning and the end of a file of code
sft.py         the answers of conversations, and completions
image.py       answers to tasks on pictures
distill.py     what a teacher would have said at each place
dpo.py         which of two answers is preferred
reward.py      a number for each answer, by which the preferred one is larger
rl.py          answers of the model's own that a judge finds better than others (judges.py)
reference.py   what DPO and RL stay near to: the model before training
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gemkit.adapters import saved
from gemkit.adapters.resolve import find
from gemkit.errors import ConfigError
from gemkit.family import Modality
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import OBJECTIVES
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.objectives import judges, reference
from gemkit.train.objectives.distill import Distill
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.infill import Infill
from gemkit.train.objectives.pretrain import Pretrain
from gemkit.train.objectives.reward import Reward
from gemkit.train.objectives.rl import Grpo
from gemkit.train.objectives.sft import Sft
from gemkit.train.tables import convert
from gemkit.weights.load import load_module, put_score

_KINDS = {kind.name: kind for kind in (Sft, Pretrain, Infill, Distill, Dpo, Reward, Grpo)}
assert tuple(_KINDS) == OBJECTIVES  # which names them without importing torch


def kind_of(name: str, form: str = "") -> Any:
    """The class of an objective, by the name that an experiment says and the form of the records."""
    kind = _KINDS[name]
    return getattr(kind, "by_form", {}).get(form, kind)


def make(experiment: Experiment, tokenizer: Tokenizer, vision: Modality | None, form: str) -> Objective:
    """The objective that an experiment asks for; models that it needs are not loaded yet.

    Args:
        form: of the records: fine-tuning on pictures is the objective "image".

    Raises:
        ConfigError: for an option that the objective has not, or a value that cannot be.
    """
    kind = kind_of(experiment.objective, form)
    options = convert(dict(experiment.options), kind.Options, experiment.objective, "options")
    given: dict[str, Any] = {}
    if "vision" in kind.needs:
        if vision is None:
            raise ConfigError("records with images, and a model that sees none: use a PaliGemma")
        given["vision"] = vision
    return kind(tokenizer, options, context=experiment.data.max_length, **given)


def others(objective: Any, experiment: Experiment) -> int:
    """The number of further models of about this size in memory: a teacher, a reference, a reward model."""
    copied = "reference" in objective.needs and not experiment.lora.rank
    judged = "judge" in objective.needs and bool(objective.options.reward)
    return int(copied) + int("teacher" in objective.needs) + int(judged)


def attach(objective: Objective, experiment: Experiment, module: LanguageModel) -> None:
    """Give an objective what it needs: after adapters are in, before training.

    Raises:
        ConfigError: if no teacher is named, or what judges is neither named nor given.
    """
    for need in sorted(objective.needs):
        if need in _SUPPLY:
            _SUPPLY[need](objective, experiment, module)


def _reference(objective: Any, _: Experiment, module: LanguageModel) -> None:
    objective.reference = reference.frozen(module)


def _teacher(objective: Any, _: Experiment, module: LanguageModel) -> None:
    if objective.teacher is not None:
        return
    if not objective.options.teacher:
        raise ConfigError("distill has no teacher: options.teacher=MODEL")
    with find(objective.options.teacher) as checkpoint:
        objective.teacher = load_module(checkpoint, device=module.device)[0]


def _judge(objective: Any, _: Experiment, module: LanguageModel) -> None:
    if objective.judge is not None:
        return
    if not objective.options.reward:
        raise ConfigError("rl has nothing that rewards: options.reward=MODEL, or a function of yours by --reward")
    with find(objective.options.reward) as checkpoint:
        judge = load_module(checkpoint, device=module.device)[0]
        for folder in checkpoint.place.adapters:
            saved.attach(judge, folder)
        objective.judge = judges.Reward(judge, checkpoint.tokenizer, checkpoint.prompts)


def _score(_: Any, experiment: Experiment, module: LanguageModel) -> None:
    new_score(module, experiment.seed)


_SUPPLY: Mapping[str, Callable[[Any, Experiment, Any], None]] = {
    "reference": _reference,
    "teacher": _teacher,
    "judge": _judge,
    "score": _score,
}


def new_score(module: LanguageModel, seed: int) -> None:
    """A reward head, drawn as Transformers draws its own: normal, 0.02 wide. One that is there is trained further."""
    if module.vision is not None:
        raise ConfigError("a reward model reads text alone, and this model has an image tower")
    if module.score is None:
        drawn = torch.randn(1, module.config.width, generator=torch.Generator().manual_seed(seed))
        put_score(module, 0.02 * drawn)
    module.get_submodule("score").requires_grad_(True)

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

import inspect
from typing import Any

import torch

from gemkit.adapters import lora
from gemkit.adapters.resolve import find
from gemkit.errors import ConfigError, nearest
from gemkit.family import Modality
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train.data.infilling import Infilling
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.objectives import judges, reference
from gemkit.train.objectives.distill import Distill
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.image import Image
from gemkit.train.objectives.infill import Infill
from gemkit.train.objectives.pretrain import Pretrain
from gemkit.train.objectives.reward import Reward
from gemkit.train.objectives.rl import Grpo
from gemkit.train.objectives.sft import Sft
from gemkit.weights.load import load_module, put_score

REGISTRY: dict[str, Any] = {
    kind.name: kind for kind in (Pretrain, Infill, Sft, Image, Distill, Dpo, Reward, Grpo)
}  # by the name that an experiment says
_MODELS = {"distill": "teacher", "rl": "reward"}  # options that name a model, which `attach` loads


def make(experiment: Experiment, tokenizer: Tokenizer, vision: Modality | None, form: str) -> Objective:
    """The objective that an experiment asks for; models that it needs are not loaded yet.

    Args:
        form: of the records: fine-tuning on pictures is the objective "image".

    Raises:
        ConfigError: for an option that the objective has not, or a value that cannot be.
    """
    name = "image" if experiment.objective == "sft" and form == "image" else experiment.objective
    if name == "image" and vision is None:
        raise ConfigError("records with images, and a model that sees none: use a PaliGemma")
    options = dict(experiment.options)
    options.pop(_MODELS.get(name, ""), None)
    known = set(inspect.signature(REGISTRY[name]).parameters) - {"tokenizer", "vision", "teacher", "judge", "context"}
    if name == "infill":
        known = set(inspect.signature(Infilling).parameters)
    for option in options:
        if option not in known:
            raise ConfigError(f"options.{option}: {name} has no such option; {nearest(option, sorted(known))}")
    settings: dict[str, Any] = {"how": Infilling(**options)} if name == "infill" else options
    if name == "image":
        settings["vision"] = vision
    return REGISTRY[name](tokenizer, context=experiment.data.max_length, **settings)


def others(experiment: Experiment) -> int:
    """How many more models of about this size are in memory: a teacher, a reference, a reward model."""
    needs_copy = experiment.objective in ("dpo", "rl") and not experiment.lora.rank
    return int(needs_copy) + int(bool(experiment.options.get(_MODELS.get(experiment.objective, ""))))


def attach(objective: Objective, experiment: Experiment, module: LanguageModel) -> None:
    """Give an objective the models that it needs, and a reward model its head: after adapters are in, before training.

    Raises:
        ConfigError: if no teacher is named, or what judges is neither named nor given.
    """
    named = experiment.options.get(_MODELS.get(objective.name, ""), "")
    if isinstance(objective, Dpo | Grpo) and getattr(objective, "kl", 1):
        objective.reference = reference.frozen(module)
    if isinstance(objective, Reward):
        new_score(module, experiment.seed)
    if isinstance(objective, Distill) and objective.teacher is None:
        if not named:
            raise ConfigError("distill has no teacher: options.teacher=MODEL")
        with find(named) as checkpoint:
            objective.teacher = load_module(checkpoint, device=module.device)[0]
    if isinstance(objective, Grpo) and objective.judge is None:
        if not named:
            raise ConfigError("rl has nothing that rewards: options.reward=MODEL, or a function of yours by --reward")
        with find(named) as checkpoint:
            judge = load_module(checkpoint, device=module.device)[0]
            for folder in checkpoint.place.adapters:
                lora.attach(judge, folder)
            objective.judge = judges.Reward(judge, checkpoint.tokenizer, checkpoint.prompts)


def new_score(module: LanguageModel, seed: int) -> None:
    """A reward head, drawn as Transformers draws its own: normal, 0.02 wide. One that is there is trained further."""
    if module.vision is not None:
        raise ConfigError("a reward model reads text alone, and this model has an image tower")
    if module.score is None:
        drawn = torch.randn(1, module.config.width, generator=torch.Generator().manual_seed(seed))
        put_score(module, 0.02 * drawn)
    module.get_submodule("score").requires_grad_(True)

"""Which objective an experiment means, made with what is in `[options]`, and the other models that it needs.

`[options]` are the keyword arguments of the objective's class (of `objectives.infilling.Infilling` for infill), and:

    teacher   of distill: the model to learn from, as -m names it
    reward    of rl: a reward model in a folder that `gemkit tune reward` made, or "answer": 1 where the answer ends with
              the record's field `answer`, else 0
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gemkit.errors import ConfigError, nearest
from gemkit.family import Vision
from gemkit.text import Tokenizer
from gemkit.train.data.infilling import Infilling
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.objectives import reference
from gemkit.train.objectives.distill import Distill
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.image import Image
from gemkit.train.objectives.infill import Infill
from gemkit.train.objectives.pretrain import Pretrain
from gemkit.train.objectives.reward import Reward
from gemkit.train.objectives.rl import Grpo
from gemkit.train.objectives.sft import Sft
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module

_CLASSES: dict[str, Any] = {
    "pretrain": Pretrain,
    "infill": Infill,
    "sft": Sft,
    "distill": Distill,
    "dpo": Dpo,
    "reward": Reward,
    "rl": Grpo,
}
_MODELS = {"distill": "teacher", "rl": "reward"}  # the option that names another model
ANSWER = "answer"


def make(experiment: Experiment, tokenizer: Tokenizer, vision: Vision | None, form: str) -> Objective:
    """The objective, without the other models that it needs: `attach` gives them.

    Raises:
        ConfigError: for an option that there is not, or one that must be given.
    """
    options, context = dict(experiment.options), experiment.data.max_length
    kind = _CLASSES[experiment.objective]
    named = _MODELS.get(experiment.objective)
    if named and not options.pop(named, None):
        raise ConfigError(f"{experiment.objective} needs options.{named}: a model, as -m names it{_or_answer(named)}")
    if form == "image":
        if experiment.objective != "sft" or vision is None:
            raise ConfigError(
                f"{experiment.objective} of records with images: these are for sft, of a model that sees them, such as "
                "paligemma-3b-pt-224"
            )
        _check(experiment.objective, options, _keywords(Image) - {"context"})
        return Image(tokenizer, vision, context=context, **options)
    if kind is Infill:
        _check("infill", options, {f.name for f in fields(Infilling)})
        return Infill(tokenizer, context=context, how=Infilling(**options))
    _check(experiment.objective, options, _keywords(kind) - {"context"})
    return kind(tokenizer, context=context, **options)


def _or_answer(named: str) -> str:
    return "" if named == "teacher" else f', or "{ANSWER}", which compares with the record\'s field of that name'


def _keywords(kind: Any) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _check(objective: str, options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise ConfigError(f"{objective} has no option {name!r}; " + nearest(name, known))


def others(experiment: Experiment) -> int:
    """How many other models of about the same size are in memory: a teacher, a reference, a reward model."""
    named = experiment.options.get(_MODELS.get(experiment.objective, ""), ANSWER) != ANSWER
    copied = experiment.objective in ("dpo", "rl") and not experiment.lora.rank
    return int(named) + int(copied)


def attach(objective: Any, experiment: Experiment, module: Any, tokenizer: Tokenizer) -> None:
    """Give an objective what it needs besides the model that is trained, which is not trained yet.

    Raises:
        ConfigError: if it does not go with the model.
    """
    match objective:
        case Distill():
            objective.teacher = _other(experiment, str(experiment.options["teacher"]), tokenizer)
        case Dpo() | Grpo():
            objective.reference = reference.frozen(module)
    if isinstance(objective, Grpo):
        name = str(experiment.options["reward"])
        if name == ANSWER:
            objective.judge = ends_with_answer


def _other(experiment: Experiment, name: str, tokenizer: Tokenizer) -> Any:
    """Another model with the same vocabulary, which is not trained."""
    with find(name) as checkpoint:
        if checkpoint.tokenizer.vocabulary.pieces != tokenizer.vocabulary.pieces:
            raise ConfigError(f"{name} has another tokenizer than the model that is trained: they must be the same")
        return load_module(checkpoint, dtype=experiment.model.dtype or None, device=experiment.model.device)[0]


def ends_with_answer(prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
    """1 if the last thing that is said is the record's field `answer`, else 0."""
    expected = str(record.get(ANSWER, "")).strip()
    return float(bool(expected) and answer.strip().rstrip(".").endswith(expected))

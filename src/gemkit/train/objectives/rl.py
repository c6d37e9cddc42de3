"""Reinforcement learning of answers: GRPO, against a reward model or a function of yours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from gemkit import generate as loop
from gemkit.errors import ConfigError
from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Request, Sampling
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer, prompts
from gemkit.train import losses
from gemkit.train.batching import Example, ExampleGroup
from gemkit.train.data.encoding import prompt_ids
from gemkit.train.objective import Loss, Need
from gemkit.train.objectives import reference
from gemkit.train.objectives.judges import Judge, Verdicts
from gemkit.train.objectives.pretrain import rows_of


class Grpo:
    """Group-relative policy optimisation (arXiv:2402.03300): of several answers to one prompt, those that were better
    than the others become likelier. There is no value model; the group is the baseline.

    Each step draws its answers from the weights that it then changes, once, so that the ratio of new to old
    probabilities is 1 and the clip at rest; parts of a step see the same weights.

    Args:
        judge: the reward of an answer: a function of yours, or a `judges.Reward`. `attach` may give it later.
        context: tokens of a prompt at most; longer ones are left out.
    """

    name = "rl"
    forms: tuple[str, ...] = ("prompt",)
    needs: AbstractSet[Need] = frozenset({"judge", "reference"})

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective. Raises: ConfigError."""

        reward: str = ""  # the name of a reward model, which `attach` loads
        group: int = 8  # answers to each prompt
        max_tokens: int = 128  # of an answer
        temperature: float = 1.0  # of drawing answers; log-probabilities are those at this temperature too
        kl: float = 0.04  # factor of the divergence from the reference, which is the model before training
        # "dr_grpo" (arXiv:2503.20783): advantages are not divided by the group's standard deviation, nor losses by the
        # length of their answer, which favours long wrong ones
        variant: Literal["grpo", "dr_grpo"] = "grpo"
        timeout: float = 5.0  # seconds that a function may take for one answer

        def __post_init__(self) -> None:
            if self.group < 2:
                raise ConfigError(f"group={self.group}: an answer is compared with others to its prompt, so 2 at least")
            if self.max_tokens < 1 or not self.temperature > 0 or self.kl < 0 or not self.timeout > 0:
                raise ConfigError(
                    f"max_tokens={self.max_tokens}, temperature={self.temperature} and timeout={self.timeout} must be "
                    f"above 0, kl={self.kl} not negative"
                )
            if self.variant not in ("grpo", "dr_grpo"):
                raise ConfigError(f"variant={self.variant!r} is not one of grpo, dr_grpo")

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: Options | None = None,
        *,
        judge: Judge | None = None,
        context: int | None = None,
    ):
        self.tokenizer, self.options, self.judge, self.context = tokenizer, options or self.Options(), judge, context
        if not self.options.kl:
            self.needs = frozenset({"judge"})
        self.reference: Any = None  # None: the model without its trained adapters

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        ids = np.array(prompt_ids(self.tokenizer, record["prompt"]), np.int64)
        if self.context is not None and len(ids) > self.context:
            return []
        return [(Example(ids, np.zeros(len(ids), np.float32), extra={"record": record}),)]

    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        """Answers to every prompt, their rewards as advantages, and what the reference makes of their tokens."""
        if self.judge is None:
            raise ConfigError("rl has nothing that rewards: name a reward model, or a function with --reward")
        asked = [example for unit in units for example in unit]
        answers = self._answers(model, asked, rng)
        verdicts = Verdicts(self.judge, self.options.timeout)
        made: list[ExampleGroup] = []
        for n, prompt in enumerate(asked):
            group = answers[n * self.options.group : (n + 1) * self.options.group]
            record = prompt.extra["record"]
            given = torch.tensor([verdicts(record["prompt"], a.text, record) for a in group], dtype=torch.float64)
            gains = losses.group_advantages(given, by_std=self.options.variant == "grpo")
            for answer, reward, gain in zip(group, given.tolist(), gains.tolist(), strict=True):
                ids = np.array([*prompt.ids, *answer.ids], np.int64)
                weights = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
                extra = {"advantage": gain, "reward": reward, "cut": answer.finish_reason != "stop"}
                made.append((Example(ids, weights, extra=extra),))
        if made:  # counted once a step: metrics are sums over it
            made[0][0].extra.update(failed=verdicts.failed)  # type: ignore[attr-defined]
        if self.options.kl:
            with reference.before_training(model, self.reference) as before:
                for unit in made:
                    known = reference.logprobs(before, unit, self.options.temperature)[0]
                    unit[0].extra["reference"] = known  # type: ignore[index]
        return made

    def _answers(self, model: LanguageModel, asked: Sequence[Example], rng: np.random.Generator) -> list[loop.Result]:
        stops = {True: prompts.stop_ids(self.tokenizer, "chat"), False: prompts.stop_ids(self.tokenizer, "complete")}
        unused = loop.unused_ids(model.config, len(self.tokenizer))
        requests = [
            Request(
                prompt.ids.tolist(),
                Sampling(
                    temperature=self.options.temperature,
                    seed=int(rng.integers(2**62)),
                    logit_bias=dict.fromkeys(unused, float("-inf")),
                ),
                max_tokens=self.options.max_tokens,
                stop_ids=stops[not isinstance(prompt.extra["record"]["prompt"], str)],
            )
            for prompt in asked
            for _ in range(self.options.group)
        ]
        was_training = model.training
        try:
            return loop.complete(TorchExecutor(model), requests, text_stream=self.tokenizer.stream)
        finally:
            model.train(was_training)

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return float(len(units))

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        examples = [example for unit in units for example in unit]
        rows = rows_of(model, units)
        logprobs_M = rows.loss(model, losses.token_logprobs(rows.targets, temperature=self.options.temperature))
        advantages_E = logprobs_M.new_tensor([example.extra["advantage"] for example in examples])
        known_M = None
        if self.options.kl:
            known_M = torch.cat([example.extra["reference"] for example in examples]).to(logprobs_M)
        loss_M, k3_M, _ = losses.policy_gradient(
            logprobs_M, logprobs_M.detach(), known_M, advantages_E[rows.sequences], kl=self.options.kl
        )
        counts = [
            int(example.weights.sum()) if self.options.variant == "grpo" else self.options.max_tokens
            for example in examples
        ]
        share_M = (1 / logprobs_M.new_tensor(counts))[rows.sequences]
        metrics = {
            "reward": sum(example.extra["reward"] for example in examples),
            "kl": float((k3_M * share_M).sum()),
            "length": float(sum(example.weights.sum() for example in examples)),
            "cut": float(sum(example.extra["cut"] for example in examples)),
            "reward_failed": float(sum(example.extra.get("failed", 0) for example in examples)),
        }
        return Loss((loss_M * share_M).sum(), metrics)

"""The data of an experiment: opened, put in steps, counted, and what of it is held out."""

from __future__ import annotations

import math

from gemkit.errors import ConfigError
from gemkit.train.batching import ExampleGroup
from gemkit.train.data import Data, Steps, open_data
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.process import Process


def opened(experiment: Experiment) -> tuple[Data, Data | None]:
    """The records that are trained on, and those that are held out.

    Raises:
        ConfigError: if no data is named.
        DataError: as `data.open_data`.
    """
    e = experiment.data
    if not e.train:
        raise ConfigError("no data.train: a file of examples, as --data FILE")
    train = open_data(e.train, e.form or None, e.on_bad, columns=e.map)
    return train, open_data(e.held_out, e.form or None, e.on_bad, columns=e.map) if e.held_out else None


def steps(
    experiment: Experiment,
    data: Data,
    objective: Objective,
    *,
    process: Process | None = None,
    epochs: int | None = None,
) -> Steps:
    """The steps of a run, of one process among those of it."""
    e, process = experiment.data, process or Process()
    return Steps(
        data,
        objective,
        seed=experiment.seed,
        batch_size=None if e.batch_tokens else e.batch_size,
        batch_tokens=e.batch_tokens or None,
        max_length=e.max_length,
        epochs=epochs,
        rank=process.rank,
        world=process.world,
    )


def count_steps(experiment: Experiment, data: Data, objective: Objective) -> int:
    """How many steps so many epochs take: those of the first are counted, by making them."""
    if not experiment.epochs:
        raise ConfigError("steps=0 and epochs=0: nothing is trained")
    first = sum(1 for _ in steps(experiment, data, objective, epochs=1))
    return max(1, math.ceil(first * experiment.epochs))


def held_out(experiment: Experiment, data: Data | None, objective: Objective) -> list[ExampleGroup]:
    """The units to evaluate on, in the order of their file; none where no data is held out."""
    if data is None:
        return []
    units = Steps(
        data,
        objective,
        seed=experiment.seed,
        batch_size=experiment.monitor.evaluate_examples,
        max_length=experiment.data.max_length,
        shuffle=False,
        epochs=1,
    )
    return next(units)

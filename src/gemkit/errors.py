"""Every error that a user's input can cause. Programming mistakes of our own stay plain `AssertionError`s.

    GemkitError
    ├── ConfigError         a setting that contradicts the model or another setting
    ├── ModelError          the model cannot do what is asked of it
    │   └── UnknownModelError   no member and no file of that name
    ├── WeightsError        a checkpoint that is truncated, corrupt, of another layout or of another model
    │   └── AccessError     weights that exist but cannot be had: gated, offline, no network
    ├── TextError           text that cannot be encoded; a conversation or an infilling request that makes no prompt
    ├── DataError           a file of training examples that is broken, or a record that has not the form of the others
    ├── ImageError          a picture that cannot be read, or what was found in one and contradicts it
    ├── ContextError        more tokens than the model was trained to see
    ├── StateError          a state or snapshot of another model, used out of order, or damaged
    ├── TrainingError       a run that cannot go on: a loss that is not finite, a checkpoint of another run
    │   └── NoSpaceError        a checkpoint that does not fit on the disk; the run itself can go on
    ├── Stopped             a call that was ended by its stop flag
    └── MissingExtraError   an optional part of gemkit that is not installed

Messages name the thing, the value and the way out. The command line prints the message and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GemkitError(Exception):
    """Root of the tree: catch this to catch all of ours."""


class ConfigError(GemkitError, ValueError):
    """A setting that contradicts the model or another setting."""


class ModelError(GemkitError):
    """The model cannot do what is asked of it."""


class UnknownModelError(ModelError, LookupError):
    """No member of the family and no file has that name."""


class WeightsError(GemkitError):
    """A checkpoint that is truncated, corrupt, of another layout or of another model."""


class AccessError(WeightsError):
    """Weights that exist but cannot be had: gated, offline, no network."""


class TextError(GemkitError, ValueError):
    """Text that cannot be encoded, or messages that do not make a prompt."""


class DataError(GemkitError, ValueError):
    """A file of training examples that is broken, or a record of one that has not the form of the others."""


class ImageError(GemkitError, ValueError):
    """A picture that cannot be read (damaged, of another format, beyond a limit), or something found in one that
    contradicts it."""


class ContextError(GemkitError, ValueError):
    """More tokens than the model was trained to see."""


class StateError(GemkitError):
    """A state or a snapshot of another model, used out of order, or damaged."""


class TrainingError(GemkitError):
    """A run that cannot go on: a loss or a gradient that is not finite, a checkpoint that is damaged or of another
    run."""


class NoSpaceError(TrainingError):
    """A checkpoint that does not fit on the disk. What was there before is untouched, and the run can go on."""


class Stopped(GemkitError):
    """A call that was ended by its stop flag. What it was to compute did not happen."""


class MissingExtraError(GemkitError, ImportError):
    """An optional part of gemkit that is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs the extra [{extra}], which is not installed: pip install 'gemkit[{extra}]'")
        self.extra = extra


def nearest(name: str, known: Iterable[str], otherwise: str = "", count: int = 3) -> str:
    """A clause for messages: the known names closest to `name`; if none is close, `otherwise` or a few of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return otherwise or "known: " + ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")

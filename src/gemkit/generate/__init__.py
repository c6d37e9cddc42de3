"""Ids in, ids and text out: the sampler, stop strings, speculation and the loop. Needs NumPy and no torch."""

from gemkit.executors.interface import Chunk, Executor, State
from gemkit.generate.loop import Request, TextStream, complete, generate, score
from gemkit.generate.result import Event, FinishReason, Result, Score, Timings, TokenLogprob
from gemkit.generate.sampler import GREEDY, INSTRUCTION_TUNED, Sampling, sample
from gemkit.generate.speculate import room_for
from gemkit.generate.stops import StopStrings

__all__ = [
    "GREEDY",
    "INSTRUCTION_TUNED",
    "Chunk",
    "Event",
    "Executor",
    "FinishReason",
    "Request",
    "Result",
    "Sampling",
    "Score",
    "State",
    "StopStrings",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "complete",
    "generate",
    "room_for",
    "sample",
    "score",
]

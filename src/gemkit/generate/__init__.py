"""Ids in, ids and text out: requests, sequences, policies, sampling, stop strings, speculation, the loop. No torch."""

from gemkit.executors.interface import Chunk, Executor, State, StopFlag
from gemkit.generate.loop import complete, generate, reward, score, step
from gemkit.generate.policy import Mixed, Plan, Policy, PromptsFirst
from gemkit.generate.request import MAX_TOKENS, Options, Request, TextStream, loop_options, unused_ids
from gemkit.generate.result import Event, FinishReason, Result, Score, Timings, TokenLogprob
from gemkit.generate.sampler import GREEDY, INSTRUCTION_TUNED, Defaults, Sampling, sample
from gemkit.generate.sequence import Sequence
from gemkit.generate.speculate import SpeculationController
from gemkit.generate.stops import StopStrings

__all__ = [
    "GREEDY",
    "INSTRUCTION_TUNED",
    "MAX_TOKENS",
    "Chunk",
    "Defaults",
    "Event",
    "Executor",
    "FinishReason",
    "Mixed",
    "Options",
    "Plan",
    "Policy",
    "PromptsFirst",
    "Request",
    "Result",
    "Sampling",
    "Score",
    "Sequence",
    "SpeculationController",
    "State",
    "StopFlag",
    "StopStrings",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "complete",
    "generate",
    "loop_options",
    "reward",
    "sample",
    "score",
    "step",
    "unused_ids",
]

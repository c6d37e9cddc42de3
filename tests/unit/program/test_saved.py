"""The saved programs are those that a trace of the modules gives today."""

from dataclasses import replace

import numpy as np
import pytest

from gemkit import family, ops
from gemkit.nn import build
from gemkit.program import saved
from gemkit.program.trace import trace, trace_tower


@pytest.mark.parametrize("name", ["gemma-3-270m", "recurrentgemma-2b", "paligemma2-3b-pt-224"])
def test_a_saved_program_is_the_traced_one(name):
    import torch

    member = family.get(name)
    with torch.device("meta"):
        module = build(member.decoder, member.vision)
    traced = [trace(module.decoder, sees=member.vision is not None)]
    if member.vision is not None:
        traced.append(trace_tower(module))
    assert saved.programs(member.decoder, member.vision) == traced


@pytest.mark.slow
def test_every_member_is_saved_as_it_is_traced_today():
    """`make programs` writes them anew."""
    traced = saved.traced()
    assert {key: saved._read(key) for key in traced} == traced


def test_every_member_has_a_program():
    for member in family.members():
        assert all(saved._read(key) for key in saved._keys(member.decoder, member.vision)), member.name


def test_the_length_of_contexts_in_training_makes_no_other_program():
    member = family.get("gemma-2-2b")
    longer = saved.programs(replace(member.decoder, max_context=99), None)
    assert longer == saved.programs(member.decoder, None)
    assert saved.programs(replace(member.decoder, norm_eps=1e-5), None) is None


def test_frequencies_are_those_of_the_definition():
    assert saved._frequencies()
    for given, rates in saved._frequencies().items():
        assert np.array_equal(rates, ops.rope_frequencies(*given).numpy()), given
    assert saved.frequencies(256, 12_345.0, 1.0, None) is None

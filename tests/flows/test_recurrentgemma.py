"""RecurrentGemma through the front door and the command line: all that the others do, and a state that is kept."""

import json

import pytest
import torch

import gemkit
from gemkit.errors import StateError
from gemkit.generate import Request, complete
from gemkit.nn import Batch, State
from gemkit.text import next_turn
from support.tiny_models import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("griffin") / "model"
    write(folder, "recurrentgemma-2b", chat=True)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return gemkit.load(folder)


def test_prompts_of_a_batch_are_answered_as_each_alone(model):
    prompts = ["Hello", "a much longer prompt, past the window of nine tokens", "b"]
    together = model.generate(prompts, max_tokens=12)
    assert [r.ids for r in together] == [model.generate(p, max_tokens=12).ids for p in prompts]


def test_a_conversation_equals_its_history_read_anew(model):
    talk = model.conversation(temperature=0, max_tokens=6)
    talk.say("Hello!")
    turn = next_turn(model.tokenizer, talk.ids, "And then?")
    anew = Request([*talk.ids, *turn.ids], max_tokens=6, stop_ids=turn.stop_ids)
    second = talk.say("And then?")
    assert second.timings.cached_tokens > 0
    assert complete(model.executor, [anew])[0].ids == second.ids


def test_a_saved_state_goes_on_as_if_never_gone(model, tmp_path):
    ids = model.tokenizer.with_bos(model.tokenizer.encode("a prompt that is longer than the window"))
    with torch.inference_mode():
        expected = model.module(Batch.of([ids]))
        state = model.module.new_state()
        model.module(Batch.of([ids[:20]]), state)
        state.snapshot(0).save(tmp_path / "state.safetensors")
        again = model.module.new_state(0)
        assert again.restore(again.load(tmp_path / "state.safetensors")) == 0
        got = model.module(Batch.of([ids[20:]], offsets=[20]), again)
    torch.testing.assert_close(got, expected[20:], rtol=0, atol=2e-5 * expected.abs().max().item())
    with pytest.raises(StateError, match="another model"):
        State(gemkit.get("gemma-2b").decoder, 1).load(tmp_path / "state.safetensors")


def test_saving_and_loading_keeps_answers_and_what_it_was_tuned_for(model, tmp_path):
    model.save(tmp_path / "copy")
    copy = gemkit.load(tmp_path / "copy")
    assert copy.prompts == model.prompts
    assert copy.generate("Hello", max_tokens=8).ids == model.generate("Hello", max_tokens=8).ids


def test_verbs(run, folder):
    code, out, _ = run("generate", "-m", folder, "-n", 4, "--json", "Hello")
    assert code == 0
    assert len(json.loads(out)["answers"][0]["ids"]) <= 4
    code, out, _ = run("chat", "-m", folder, "-n", 4, "-t", 0, "--json", stdin=b"Hello!\nMore?\n")
    assert code == 0
    assert json.loads(out.splitlines()[1])["timings"]["cached_tokens"] > 0
    code, out, _ = run("score", "-m", folder, "Hello there", "--json")
    assert code == 0
    assert json.loads(out)["perplexity"] > 1
    code, out, _ = run("show", folder)
    assert code == 0
    assert "rg_lru" in out
    code, out, _ = run("explain-prompt", "--chat", "-m", folder, "Hello")
    assert code == 0
    assert "<start_of_turn>" in out


def test_show_and_compare_say_what_recurrence_saves(run):
    code, out, _ = run("show", "recurrentgemma-2b", "--json")
    assert code == 0
    code, out, _ = run("compare", "recurrentgemma-2b", "gemma-2b")
    assert code == 0
    assert "needs less memory" in out
    assert "46" in out  # tokens from which its state is the smaller one: (46 - 1) * 18 KiB is less, 46 * 18 KiB is not

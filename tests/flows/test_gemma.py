"""The front door: what `gemkit.load` returns, as a program uses it."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

import gemkit
from gemkit import text
from gemkit.errors import ConfigError, ContextError, ModelError, TextError, WeightsError
from gemkit.executors.native import library as native
from support.tiny import assert_close
from support.tiny_models import LETTERS, tokenizer, write

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def plain(models):
    return gemkit.load(models / "random")


@pytest.fixture(scope="module")
def talker(models):
    return gemkit.load(models / "chat")


@pytest.fixture(scope="module")
def coder(models):
    return gemkit.load(models / "code")


@pytest.fixture(scope="module")
def parrot(models):
    return gemkit.load(models / "parrot-chat")


@pytest.fixture(scope="module")
def letters():
    """A bias that leaves nothing but letters, each of which is one token: such an answer is encoded as it was made."""
    bias = dict.fromkeys(range(len(tokenizer())), -math.inf)
    return {**GREEDY, "max_tokens": 5, "logit_bias": bias | {tokenizer().id(c): 0.0 for c in LETTERS if c.isalpha()}}


def test_import_is_cheap():
    program = """
import sys, gemkit
assert not {"torch", "numpy", "sentencepiece", "huggingface_hub", "gemkit.family"} & sys.modules.keys()
assert set(gemkit.__all__) == set(dir(gemkit))
gemkit.get("gemma-2b")
assert "torch" not in sys.modules
try:
    gemkit.load("gemma-9b")
except gemkit.GemkitError:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ── generate, stream ────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_prompt_and_several(plain):
    one = plain.generate("hello", max_tokens=6)
    several = plain.generate(["hello", "good day"], max_tokens=6)
    assert one.finish_reason == "length"
    assert [result.ids for result in several] == [one.ids, plain.generate("good day", max_tokens=6).ids]
    assert plain.generate([]) == []
    assert str(one) == one.text


def test_a_stream_is_the_answer_in_pieces(plain):
    stream = plain.stream("hello", max_tokens=8)
    pieces = list(stream)
    assert stream.result.ids == plain.generate("hello", max_tokens=8).ids
    assert "".join(pieces) == stream.result.text
    assert len(pieces) == 8


def test_a_stream_that_is_interrupted_keeps_what_it_has(parrot):
    stream = parrot.stream("ab", max_tokens=8)
    assert next(stream) + next(stream) == "bb"
    result = stream.interrupt()
    assert (result.text, result.finish_reason) == ("bb", "interrupted")
    assert stream.interrupt() is result
    assert list(stream) == []


def test_ctrl_c_inside_finish_keeps_what_there_is(parrot, monkeypatch):
    stream, run, calls = parrot.stream("ab", max_tokens=8), parrot.executor.run, []

    def interrupted(chunks, state, **options):
        calls.append(chunks)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(chunks, state, **options)

    monkeypatch.setattr(parrot.executor, "run", interrupted)
    result = stream.finish()
    assert (result.text, result.finish_reason) == ("bbb", "interrupted")


def test_control_text(parrot):
    assert parrot.generate("a<eos>", max_tokens=2).text == ">>"
    assert parrot.generate("a<eos>", max_tokens=2, control=True).stopped_by == parrot.tokenizer.eos


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_options(plain, parrot):
    hot = {"max_tokens": 8, "temperature": 2.0}
    drawn = plain.generate("x", **hot)
    assert plain.generate("x", **hot, seed=drawn.seed).ids == drawn.ids
    assert plain.generate("x", **hot, top_k=1).ids == plain.generate("x", max_tokens=8).ids
    banned = dict.fromkeys(range(10), -math.inf)
    assert set(plain.generate("x", **hot, logit_bias=banned).ids).isdisjoint(banned)
    assert len(plain.generate("x", max_tokens=2, logprobs=3).logprobs[0].top) == 3
    assert parrot.generate("x" * 250, max_tokens=None, stop=["no such text"]).text == "xxxxx"
    guessed = parrot.generate("x" * 30, max_tokens=20, speculate=True)
    assert guessed.text == "x" * 20
    assert guessed.timings.drafted_tokens > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "unknown option 'max_new_tokens'; options are max_tokens, "),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.5}, "temperature 0"),
        ({"stop": "END"}, "must be a sequence of strings"),
        ({"stop": [""]}, "at least one character"),
        ({"logit_bias": {10**9: 1.0}}, "no token id"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"speculate": -1}, "speculate=-1"),
        ({"beyond_context": True, "max_tokens": None}, "max_tokens must be set"),
    ],
)
def test_options_that_cannot_be(plain, options, message):
    with pytest.raises(ConfigError, match=message):
        plain.generate("x", **options)
    with pytest.raises(ConfigError, match=message):
        plain.stream("x", **options)  # at once, not when the first piece is asked for


def test_arguments_of_load_that_cannot_be(models):
    for arguments in ({"executor": "gpu"}, {"dtype": "float16"}, {"dtype": torch.int8}, {"device": "warp"}):
        with pytest.raises(ConfigError, match=str(next(iter(arguments)))):
            gemkit.load(models / "random", **arguments)


def test_a_context_that_is_full(parrot):
    with pytest.raises(ContextError, match=r"301 tokens .* 256"):
        parrot.generate("x" * 300)
    assert parrot.generate("x" * 300, max_tokens=2, beyond_context=True).text == "xx"
    assert parrot.generate("x" * 253, max_tokens=9).finish_reason == "context"


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────────


def history(*turns):
    """Messages, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_turns_are_those_of_the_whole_history_encoded_anew(talker, letters):
    """The state of the first turn, continued, against everything computed from the beginning."""
    talk = talker.conversation(system="be kind", **letters)
    first = talk.say("ab")
    second = talk.say(" cd ")
    third = talk.say("ef")
    messages = [{"role": "system", "content": "be kind"}, *history("ab", first.text, "cd", second.text, "ef")]
    assert talk.ids == [*text.chat(talker.tokenizer, messages).ids, *third.ids]
    assert talker.chat(messages, **letters).ids == third.ids
    assert second.timings.cached_tokens == len(text.chat(talker.tokenizer, messages[:2])) + len(first.ids) - 1


def test_a_turn_that_was_interrupted_counts_as_far_as_it_came(talker, letters):
    talk = talker.conversation(**letters)
    stream = talk.stream("ab")
    said = next(stream) + next(stream)
    assert stream.interrupt().text == said
    assert talk.say("cd").ids == talker.chat(history("ab", said, "cd"), **letters).ids


def test_a_turn_that_was_abandoned_never_was(talker, letters):
    talk = talker.conversation(**letters)
    first = talk.say("ab")
    before = len(talk.ids)
    next(talk.stream("what nobody waits for"))
    answer = talk.say("cd")
    assert answer.ids == talker.chat(history("ab", first.text, "cd"), **letters).ids
    assert 0 < answer.timings.cached_tokens <= before  # the snapshot before the dropped turn, and nothing of that turn
    assert talk.say("ef").timings.cached_tokens > 0


def test_a_turn_that_failed_never_was(talker, letters):
    talk = talker.conversation(**letters)
    first = talk.say("ab")
    with pytest.raises(ContextError):
        talk.say("x" * 300)
    with pytest.raises(TextError):
        talk.say("\udc80")
    answer = talk.say("cd")
    assert answer.ids == talker.chat(history("ab", first.text, "cd"), **letters).ids
    assert answer.timings.cached_tokens > 0


def test_a_conversation_that_speculates_says_the_same(talker, letters):
    letters = {**letters, "max_tokens": 20}
    plain, guessing = talker.conversation(**letters), talker.conversation(**letters, speculate=True)
    for words in ("abc", "abc", "abc"):
        assert guessing.say(words).text == plain.say(words).text
        assert guessing.ids == plain.ids


def test_a_conversation_goes_on_after_eos(talker):
    eos = talker.tokenizer.eos
    talk = talker.conversation(**GREEDY, logit_bias={eos: 1e6})
    assert talk.say("ab").ids == (eos,)
    assert talk.say("cd").ids == (eos,)
    assert talk.ids == text.chat(talker.tokenizer, history("ab", "", "cd")).ids


def test_end_of_turn_is_not_written_twice(talker):
    end = talker.tokenizer.end_of_turn
    talk = talker.conversation(**GREEDY, logit_bias={end: 1e6})
    assert talk.say("ab").ids == (end,)
    talk.say("cd")
    assert talk.ids == [*text.chat(talker.tokenizer, history("ab", "", "cd")).ids, end]


def test_two_conversations_do_not_hear_each_other(talker, letters):
    one, other = talker.conversation(**letters), talker.conversation(**letters)
    first = one.say("ab")
    other.say("xy")
    assert one.say("cd").ids == talker.chat(history("ab", first.text, "cd"), **letters).ids


def test_chat_with_a_pretrained_model_warns(plain, talker):
    for ask in (lambda: plain.chat("hi", max_tokens=1), lambda: plain.conversation()):
        with pytest.warns(UserWarning, match="pretrained model") as caught:
            ask()
        assert caught[0].filename == __file__  # points at who asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        talker.chat("hi", max_tokens=1)


@pytest.mark.parametrize(
    "messages",
    [[], history("a", "b"), [{"role": "robot", "content": "a"}], [{"role": "user"}], [{"role": "user", "content": 5}]],
)
def test_messages_that_make_no_prompt(talker, messages):
    with pytest.raises(TextError):
        talker.chat(messages)


# ── infill, score ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_infill(coder, plain):
    options = {"path": "a.py", "files": [("b.py", "y = 2\n")], "max_tokens": 4}
    result = coder.infill("x = ", "\n", **options)
    assert result.timings.prompt_tokens == len(
        text.infill(coder.tokenizer, "x = ", "\n", path="a.py", files=options["files"])
    )
    assert coder.infill_stream("x = ", "\n", **options).finish().ids == result.ids
    with pytest.raises(ModelError, match="codegemma-2b"):
        plain.infill("a", "b")
    with pytest.raises(ConfigError, match="max_tokens=256 leaves no room"):
        coder.infill("a", "b", max_tokens=256)


def test_score_is_what_transformers_says(tmp_path):
    theirs = write(tmp_path, "gemma-2-2b")
    ours = gemkit.load(tmp_path, executor="torch")
    score = ours.score("one two three", top=4)
    ids = torch.tensor([ours.tokenizer.with_bos(ours.tokenizer.encode("one two three"))])
    with torch.no_grad():
        logprobs_TV = theirs(ids).logits[0].log_softmax(-1)
    expected = logprobs_TV[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert score.logprobs[0] is None
    assert_close(torch.tensor([entry.logprob for entry in score.logprobs[1:]]), expected)
    assert score.perplexity == pytest.approx(math.exp(theirs(ids, labels=ids).loss.item()), rel=1e-5)  # float32 mean
    best = logprobs_TV[0].topk(4)
    assert [token for token, _ in score.logprobs[1].top] == best.indices.tolist()


# ── showing, keeping ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_it_says_of_itself(plain, models):
    assert repr(plain) == f"Gemma({str(models / 'random')!r})"
    assert "(self_attn)" in str(plain)
    summary = plain.summary()
    count = sum(weight.numel() for weight in plain.module.parameters())
    assert f"{count:,} parameters, 26 layers of width 32" in summary
    assert "computed in float32 on cpu" in summary
    assert "native: " in summary
    assert "kernels" in summary
    plain_torch = gemkit.load(models / "random", executor="torch")
    assert "soft-capped" in plain_torch.summary()


def test_saved_and_loaded_again(talker, coder, tmp_path):
    for model, ask in (
        (talker, lambda m: m.generate("ab", max_tokens=6)),
        (coder, lambda m: m.infill("a", "b", max_tokens=6)),
    ):
        folder = model.save(tmp_path / str(len(model.config.layers)))
        again = gemkit.load(folder)
        assert (again.config, again.prompts) == (model.config, model.prompts)
        assert ask(again).ids == ask(model).ids
        with pytest.raises(WeightsError, match="save to a new folder"):
            model.save(folder)


def test_the_real_model_loads_dense_as_quantized():
    """The same numbers, to what bfloat16 keeps of them: the same first tokens."""
    quantized, dense = gemkit.load(), gemkit.load(quantized=False)
    prompt = "Monday, Tuesday, Wednesday,"
    answer = quantized.generate(prompt, max_tokens=2)
    assert answer.text == " Thursday,"
    assert dense.generate(prompt, max_tokens=2).ids == answer.ids
    assert dense.report.nbytes > 3 * quantized.report.nbytes
    assert "were made dense" in dense.summary()


def test_without_a_native_executor_torch_computes_and_says_why(models, monkeypatch):
    def refuse(**_):
        raise ModelError("built without a C++ compiler")

    monkeypatch.setattr(native, "library", refuse)
    model = gemkit.load(models / "random")
    assert model.executor.name == "torch"
    assert "torch computes it: built without a C++ compiler" in model.report.notes
    assert not any("computes it" in note for note in gemkit.load(models / "random", executor="torch").report.notes)

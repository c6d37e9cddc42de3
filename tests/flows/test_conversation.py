"""A conversation that is saved and goes on: in this process and in another one, on each executor."""

import json
import subprocess
import sys

import pytest

import gemkit
from gemkit.errors import StateError
from gemkit.generate import Options

GREEDY = Options(temperature=0, max_tokens=6, logit_bias={5: -1.0})

GO_ON = """
import json, sys
import gemkit
talk = gemkit.load(sys.argv[1], executor=sys.argv[2]).load_conversation(sys.argv[3])
answer = talk.say("and then?")
print(json.dumps([answer.ids, answer.text, answer.timings.cached_tokens, "torch" in sys.modules]))
"""


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_saved_conversation_goes_on_in_another_process(models, tmp_path, executor):
    model = gemkit.load(models / "chat", executor=executor)
    talk = model.conversation("Be brief.", **GREEDY)
    talk.say("hello")
    dropped = talk.stream("a turn that is not at its end")
    next(dropped)
    saved = talk.save(tmp_path / "talk")
    wanted = talk.say("and then?")
    argv = [sys.executable, "-c", GO_ON, models / "chat", executor, saved]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    ids, text, cached, torch = json.loads(done.stdout)
    assert (tuple(ids), text) == (wanted.ids, wanted.text)
    assert cached == wanted.timings.cached_tokens > 0
    assert torch is (executor == "torch")  # what is packed is opened without it


def test_what_cannot_be_saved_or_loaded_is_told(models, tmp_path):
    model = gemkit.load(models / "chat")
    talk = model.conversation(**GREEDY)
    with pytest.raises(StateError, match="nothing has been said yet"):
        talk.save(tmp_path / "talk")
    talk.say("hello")
    saved = talk.save(tmp_path / "talk")
    with pytest.raises(StateError, match="cannot write"):
        talk.save(saved)  # what is there is never touched
    with pytest.raises(StateError, match="cannot be read"):
        model.load_conversation(tmp_path / "none")
    for other in (gemkit.load(models / "parrot-chat"), gemkit.load(models / "chat", executor="torch")):
        with pytest.raises(StateError):
            other.load_conversation(saved)
    file = saved / "conversation.json"
    record = json.loads(file.read_text())
    for damage in ({"ids": [10**9]}, {"ids": [2]}, {"options": {"colour": 1}}, {"version": 1}, {"messages": 3}):
        file.write_text(json.dumps({**record, **damage}))
        with pytest.raises(StateError, match=r"damaged|version 1"):
            model.load_conversation(saved)

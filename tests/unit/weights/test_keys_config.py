"""Published configurations, and those that Transformers writes, against the table of keys."""

import pytest
import transformers

from gemkit.errors import ConfigError
from gemkit.weights.keys_config import CONFIGS, check_config
from gemkit.weights.known_keys import check_keys
from support.published_configs import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_known_whole(name):
    assert check_config(PUBLISHED[name], name) == []


@pytest.mark.parametrize(
    "kind",
    ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config", "RecurrentGemmaConfig", "PaliGemmaConfig"],
)
def test_configurations_that_transformers_writes_are_known_whole(kind):
    assert check_config(getattr(transformers, kind)().to_dict(), kind) == []


def test_a_key_that_is_not_known_is_noted_by_name():
    (note,) = check_config({**PUBLISHED["gemma-2b"], "attention_sinks": 4}, "x")
    assert note == "x: not known here, and not used: attention_sinks"
    (note,) = check_config({**PUBLISHED["gemma-3-4b-pt"], "text_config": {"moe_layers": 2}}, "x")
    assert note == "x: text_config: not known here, and not used: moe_layers"


def test_a_key_that_would_change_a_result_is_refused():
    with pytest.raises(ConfigError, match="attention_bias=True"):
        check_config({**PUBLISHED["gemma-2-2b"], "attention_bias": True}, "x")
    with pytest.raises(ConfigError, match="use_bidirectional_attention=True"):
        check_config({**PUBLISHED["gemma-3-1b-it"], "use_bidirectional_attention": True}, "x")


def test_a_key_that_transformers_does_not_read_is_noted():
    (note,) = check_keys({"sliding_window_pattern": 3}, CONFIGS["gemma2"], "x")
    assert note.startswith("x: sliding_window_pattern=3 is not used")

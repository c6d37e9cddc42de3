"""The three commands that print the family: what goes where, how wide, and without torch."""

import json
import re
import subprocess
import sys

import pytest

from gemkit.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; its exit code, stdout and stderr."""

    def run(*argv, columns=None):
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        code = main(argv)
        return code, *capsys.readouterr()

    return run


def test_show_begins_with_the_answer(run):
    code, out, err = run("show", "gemma-7b")
    assert (code, err) == (0, "")
    first, rest = out.split("Decoder(")
    assert first.startswith("gemma-7b: Gemma 1, pretrained")
    assert "8,537,680,896" in first
    assert "448 KiB a token" in first
    assert "(0-27): 28 x Block(" in rest


def test_show_names_what_is_published_otherwise(run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # the width of a pipe; pytest-xdist sets one for its workers
    _, out, _ = run("show", "gemma-2b")
    (line,) = (line for line in out.splitlines() if "pre_feedforward_layernorm" in line)
    assert line.endswith("2,048  post_attention_layernorm")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tree_is_never_wrapped(run, columns):
    _, out, _ = run("show", "gemma-7b", columns=columns)
    tree = out[out.index("Decoder(") :].splitlines()
    assert max(map(len, tree)) <= columns
    assert all(line.lstrip().startswith(("(", ")", "global")) for line in tree[1:])


def test_show_says_what_an_image_costs_here_and_at_other_resolutions(run):
    _, out, _ = run("show", "paligemma-3b-mix-448")
    assert "one image   1,024 tokens of 448 x 448 pixels, 12.5% of the context, 18.9 MB of cache" in out
    assert "at 224 px   256 tokens, 3.1% of the context, 4.72 MB of cache, 220 GFLOP; another model\n" in out
    assert "at 896 px   4,096 tokens, 50.0% of the context, 75.5 MB of cache, 5.48 TFLOP; another model\n" in out
    _, out, _ = run("compare", "paligemma-3b-pt-224", "paligemma-3b-pt-896")
    assert re.search(r"tokens an image +256 +4,096 +x 16", out)
    assert re.search(r"cache an image +4.72 MB +75.5 MB +x 16", out)


def test_show_at_another_context_and_dtype(run):
    _, out, _ = run("show", "gemma-2b", "--context", "1000", "--dtype", "int4")
    assert "18.4 MB at 1,000 tokens" in out  # 18 KiB x 1000
    assert "  weights     1.41 GB in int4" in out


def test_show_beyond_the_trained_context_says_so(run):
    code, out, err = run("show", "gemma-2b", "--context", "9000")
    assert code == 0
    assert "9,000" in out
    assert "8,192" in err


def test_show_full_prints_every_run_of_layers(run):
    _, out, _ = run("show", "gemma-3-1b", "--full")
    assert "(0-4): 5 x Block(" in out
    assert "(5): Block(" in out


def test_show_json(run):
    code, out, err = run("show", "google/gemma-2-2b-it", "--json", "--context", "8192")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["hub_id"] == "google/gemma-2-2b-it"
    assert record["decoder"]["layers"][0] == {
        "kind": "sliding",
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 256,
        "scale": 1 / 16,
        "window": 4096,
        "rope": {"base": 10000.0, "factor": 1.0, "fraction": 1.0, "yarn": None, "dynamic": None},
        "reach": "past",
        "softcap": 50.0,
        "qk_norm": False,
        "ffw": {"width": 9216},
    }
    assert record["cost"]["parameters"]["total"] == 2_614_341_888
    assert record["cost"]["cache_bytes_per_token"]["global_attention"] == 13 * 4096


def test_show_a_checkpoint_of_ones_own(run, tmp_path):
    import transformers as hf

    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "head_dim": 32, "vocab_size": 128}
    config = hf.Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=7)
    model = hf.Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path / "mine")
    code, out, _ = run("show", str(tmp_path / "mine"))
    assert code == 0
    assert f"{model.num_parameters():,}" in out
    assert "2 x (sliding, global); windows of 7" in out


def test_compare_prints_what_differs(run):
    code, out, err = run("compare", "gemma-2b", "gemma-7b")
    assert code == 0
    assert out.startswith("gemma-2b: 2.51B parameters")
    assert "MLP width" in out
    assert "vocabulary" not in out
    assert "--all" in err
    _, everything, _ = run("compare", "gemma-2b", "gemma-7b", "--all")
    assert "vocabulary" in everything


def test_compare_explains(run):
    _, out, _ = run("compare", "gemma-2b", "gemma-7b", "--explain", columns=80)
    assert "post_attention_layernorm" not in out  # both have two norms: the row is the same, so it is not printed
    assert "! gemma-2b: Some configurations and articles print 32,768" in out.replace("\n      ", " ")
    body = out[out.index("SHAPE") :]
    assert max(map(len, body.splitlines())) <= 80


def test_compare_json(run):
    _, out, _ = run("compare", "gemma-2b", "recurrentgemma-2b", "--json")
    record = json.loads(out)
    assert record["models"] == ["gemma-2b", "recurrentgemma-2b"]
    found = {row["key"]: row for row in record["rows"]}
    assert found["width"]["values"] == [2048, 2560]
    assert found["crossing"]["values"][1] == {"with_weights": [20108], "state_alone": [46]}


@pytest.mark.parametrize("command", [("models",), ("compare", "gemma-2-2b", "gemma-3-4b", "recurrentgemma-2b")])
def test_tables_fit_a_narrow_terminal_and_are_plain(run, command):
    _, out, _ = run(*command, columns=80)
    table = out[out.index("\n\n") :] if command[0] == "compare" else out
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in out
    assert "…" not in out  # nothing is cut off


def test_models_lists_everyone(run):
    from gemkit.family import names

    _, out, err = run("models")
    assert [name for name in names() if name not in out.split()] == []
    assert "51 members" in err
    _, out, _ = run("models", "--json")
    assert [record["name"] for record in json.loads(out)["models"]] == list(names())


def test_an_unknown_model_is_a_message(run):
    code, out, err = run("show", "gemma-2-3b")
    assert (code, out) == (1, "")
    assert "gemma-2-2b" in err
    assert "Traceback" not in err


def test_none_of_them_imports_torch():
    program = """
import sys
from gemkit.cli import main
import gemkit.family, gemkit.inspect.compare, gemkit.inspect.cost, gemkit.inspect.explain, gemkit.inspect.tree
for argv in (["show", "gemma-7b"], ["show", "paligemma-3b-mix-224", "--json"], ["compare", "gemma-2b", "gemma-3-4b"],
             ["compare", "gemma-2b", "recurrentgemma-2b", "--explain"], ["models"]):
    assert main(argv) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

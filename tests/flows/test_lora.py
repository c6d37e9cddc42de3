"""Adapters from the front door and the command line."""

import fnmatch
import json
import math
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

import gemkit
from gemkit.adapters import merge
from gemkit.errors import AccessError, ConfigError, UnknownModelError, WeightsError
from gemkit.weights import hub


def train(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """Of "random", a tiny Gemma 2, by name."""
    model = gemkit.load(models / "random")
    model.enable_lora(rank=4, quiet=True)
    train(model)
    return model.save_adapter(tmp_path_factory.mktemp("adapters") / "letters", data=["letters.jsonl"])


def test_one_line_and_it_trains_and_answers_at_once(models, capsys):
    model = gemkit.load(models / "random")
    before = model.score("Hello there").total
    told = model.enable_lora(rank=4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{told}\n"
    assert model.executor.name == "native"
    start = model.score("Hello there").total
    assert start == pytest.approx(before, rel=0.01)  # B is zero, and only the executor is another
    ids = torch.tensor(model.tokenizer.encode("Hello there"))
    trained = [p for p in model.module.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == told.trainable
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model.module(ids[None])[0, :-1], ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.score("Hello there").total > start + 5
    assert f"adapter    {told}" in model.summary()


def test_an_adapter_is_found_by_itself_or_beside_its_base(models, adapter):
    plain = gemkit.load(models / "random").score("Hello there").total
    beside = gemkit.load(models / "random", adapter=adapter)
    alone = gemkit.load(adapter)
    assert beside.adapters() == alone.adapters() == ["letters"]
    assert beside.score("Hello there").total == alone.score("Hello there").total
    assert abs(alone.score("Hello there").total - plain) > 1
    assert alone.label.endswith(f"random + {adapter}")
    assert any(note.startswith("adapter letters: rank 4 on 182 modules") for note in alone.report.notes)
    beside.scale_adapter(0)
    assert beside.score("Hello there").total == plain


def test_several_are_one_beside_another(models, adapter, tmp_path):
    model = gemkit.load(models / "random", adapter=[adapter, adapter])
    assert model.adapters() == ["letters", "letters-2"]
    model.remove_adapter("letters-2")
    assert model.score("Hello").total == gemkit.load(adapter).score("Hello").total


def test_both_executors_run_it(adapter):
    native, torch = (gemkit.load(adapter, executor=executor) for executor in ("native", "torch"))
    assert (native.executor.name, torch.executor.name) == ("native", "torch")
    # keys and values in float16
    assert native.score("Hello there").total == pytest.approx(torch.score("Hello there").total, rel=1e-3)


def test_merged_and_saved_it_is_a_model_that_transformers_reads(models, adapter, tmp_path):
    model = gemkit.load(adapter, dtype="float32")
    told = model.score("Hello there").total
    with pytest.raises(ConfigError, match="letters stand beside the weights and would be lost"):
        model.save(tmp_path / "merged")
    assert model.merge_adapters() == ["letters"]
    folder = model.save(tmp_path / "merged")
    assert gemkit.load(folder, executor="torch").score("Hello there").total == pytest.approx(told, rel=1e-4)
    readme = (folder / "README.md").read_text()
    assert "Merged into its weights: letters, a LoRA of rank 4" in readme
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in readme
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([model.tokenizer.encode("Hello there")])
    with torch.inference_mode():
        ours = model.module(ids)
        assert (theirs(ids).logits - ours).abs().max() < 1e-4 * ours.abs().max()
    assert model.unmerge_adapters() == ["letters"]
    assert model.score("Hello there").total == told


def test_a_chat_adapter_leaves_its_template(models, tmp_path):
    model = gemkit.load(models / "chat")
    model.enable_lora(rank=2, targets="q_proj", quiet=True)
    folder = model.save_adapter(tmp_path / "talk")
    assert (folder / "chat_template.jinja").is_file()
    assert "chat" in gemkit.load(folder).prompts
    other = gemkit.load(models / "chat")
    other.prompts = ("complete",)
    other.load_adapter(folder)
    assert other.prompts == ("complete", "chat")


@pytest.fixture
def on_the_hub(adapter, tmp_path, monkeypatch):
    """The id of an adapter that was downloaded before: the tests are offline."""
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--tiny-letters"
    shutil.copytree(adapter, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return "someone/tiny-letters"


def test_an_adapter_of_the_hub_is_found_by_its_id(models, adapter, on_the_hub):
    here = gemkit.load(adapter).score("Hello there").total
    beside = gemkit.load(models / "random", adapter=on_the_hub)
    alone = gemkit.load(on_the_hub)
    assert beside.adapters() == alone.adapters() == ["tiny-letters"]
    assert beside.score("Hello there").total == alone.score("Hello there").total == here
    assert alone.label.endswith("random + someone/tiny-letters")
    with pytest.raises(AccessError, match="someone/else is not in the local cache"):
        beside.load_adapter("someone/else")


def test_what_is_downloaded_of_an_adapter(monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: calls.append(how) or "/nowhere")
    hub.adapter("someone/tiny-letters")
    asked = calls[0]  # a folder without weights is asked for a GGUF next
    for name in ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


def test_commands_take_adapters(run, models, adapter):
    def perplexity(*argv):
        code, out, _ = run("score", *argv, "--json", "Hello there")
        assert code == 0
        return json.loads(out)["perplexity"]

    plain = perplexity("-m", models / "random")
    beside = perplexity("-m", models / "random", "--adapter", adapter)
    assert beside == perplexity("-m", adapter)
    assert abs(math.log(beside / plain)) > 0.05
    twice = perplexity("-m", models / "random", "--adapter", adapter, "--adapter", adapter)
    assert twice not in (beside, plain)
    code, out, err = run("generate", "-m", adapter, "-n", "3", "Hello")
    assert code == 0
    assert out
    assert "note: adapter letters: rank 4 on 182 modules (q_proj 26, k_proj 26" in err
    code, out, _ = run("chat", "-m", adapter, "-n", "3", "Hello")
    assert code == 0


def test_other_commands_open_an_adapters_base(run, adapter, models):
    assert run("show", adapter)[0] == 0
    code, out, _ = run("explain-prompt", "-m", adapter, "Hello")
    assert code == 0
    assert out == run("explain-prompt", "-m", models / "random", "Hello")[1].replace(
        str(models / "random"), f"{models / 'random'} + {adapter}"
    )


def test_ask_takes_an_adapter(run, models, tmp_path):
    from PIL import Image

    model = gemkit.load(models / "image")
    model.enable_lora(rank=2, quiet=True)
    train(model)
    folder = model.save_adapter(tmp_path / "shapes")
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "red.png")
    plain = run("ask", "-m", models / "image", tmp_path / "red.png", "what is this?", "-n", "8")
    code, out, _ = run("ask", "-m", folder, tmp_path / "red.png", "what is this?", "-n", "8")
    assert code == plain[0] == 0
    assert out != plain[1]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merge(run, models, adapter, tmp_path, dtype):
    out_folder = tmp_path / "merged"
    argv = ["merge", models / "random", "--adapter", adapter, "-o", out_folder, "--json"]
    code, out, _ = run(*argv, *(["--dtype", dtype] if dtype else []))
    assert code == 0
    assert json.loads(out)["merged"] == ["letters"]
    weights = load_file(out_folder / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype or 'float32'}"}
    assert (out_folder / "README.md").is_file()
    merged, beside = gemkit.load(out_folder, dtype="float32"), gemkit.load(adapter, dtype="float32")
    # bfloat16 rounds every weight to 2**-8 of itself
    assert merged.score("Hello there").total == pytest.approx(
        beside.score("Hello there").total, rel=0.05 if dtype else 1e-4
    )
    assert "exists and is not empty" in run(*argv)[2]


def test_merge_opens_an_adapter_with_its_base(run, adapter, tmp_path):
    code, _, err = run("merge", adapter, "-o", tmp_path / "merged")
    assert code == 0
    assert "letters merged; saved to" in err


def test_what_merge_refuses(error, run, models, adapter, tmp_path):
    new = tmp_path / "new"
    assert "there is no adapter to merge: give one, --adapter DIR" in error("merge", models / "random", "-o", new)
    assert "--dtype int8 is not one of" in error("merge", adapter, "-o", new, "--dtype", "int8")
    assert "is no folder" in error("merge", models / "random", "--adapter", tmp_path / "none", "-o", new)
    assert run("merge", adapter)[0] == 2
    assert not new.exists()


def test_bad_adapters_are_told_in_a_line(error, models, adapter, tmp_path):
    assert "belongs to another model" in error("score", "-m", models / "chat", "--adapter", adapter, "Hi")
    assert "is no folder" in error("score", "-m", models / "random", "--adapter", tmp_path / "none", "Hi")
    assert "is no adapter: cannot read adapter_config.json" in error(
        "score", "-m", models / "random", "--adapter", models / "chat", "Hi"
    )


def moved(adapter, folder, base):
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def test_a_base_that_is_not_there(adapter, tmp_path):
    lost = moved(adapter, tmp_path / "lost", tmp_path / "no-model")
    with pytest.raises(UnknownModelError, match=r"lost was trained on .*no-model: .*; or give its base by name"):
        gemkit.load(lost)
    with pytest.raises(WeightsError, match="as its base, which is an adapter itself"):
        gemkit.load(moved(adapter, tmp_path / "chained", adapter))
    with pytest.raises(WeightsError, match="names no base_model_name_or_path"):
        gemkit.load(moved(adapter, tmp_path / "nameless", ""))


@pytest.mark.real
def test_the_starter_keeps_its_codes_and_is_found_again(tmp_path):
    """QLoRA of the real Gemma 3 270M: the base stays in its 4 to 8 bits, and the adapter finds it from anywhere."""
    model = gemkit.load()
    told = model.enable_lora(rank=4, targets=["q_proj", "v_proj"], quiet=True)
    assert len(told.modules) == 36
    assert type(model.module.layers[0].self_attn.q_proj.weight).__name__ == "Quantized"
    ids = torch.tensor(model.tokenizer.encode("The capital of France is Paris."))
    loss = torch.nn.functional.cross_entropy(model.module(ids[None])[0, :-1], ids[1:])
    loss.backward()
    grads = [p.grad for p in model.module.parameters() if p.requires_grad]
    assert len(grads) == 72
    assert all(grad.isfinite().all() for grad in grads)
    train(model)
    told = model.score("The capital of France is Paris.").total
    folder = model.save_adapter(tmp_path / "paris")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/gemma-3-270m"
    assert gemkit.load(folder).score("The capital of France is Paris.").total == pytest.approx(told, rel=1e-6)
    with pytest.raises(ConfigError, match=r"q_proj is quantized \(Q5_0\)"):
        merge.merge(model.module)

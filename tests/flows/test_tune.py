"""`gemkit tune` from a data file to a chat with the result, and what goes wrong on the way."""

import json
import signal
import subprocess
import time
import tomllib

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import gemkit
from gemkit.train import experiment
from gemkit.train.checkpoint import FileCheckpoints
from support import killing
from support.tiny_models import tokenizer, write

WORDS = "abc def ghi"
QUICK = ["--steps", 4, "--batch-size", 2, "--max-length", 64, "--lr", "1e-2", "--set", "save.every=2"]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def chats(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": WORDS}]
    return write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 12)


@pytest.fixture
def texts(tmp_path):
    return write_lines(tmp_path / "texts.jsonl", [{"text": f"{WORDS} {i}"} for i in range(12)])


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_from_data_to_chat(run, models, chats, tmp_path):
    out = tmp_path / "first"
    samples = ["--held-out", chats, "--set", "monitor.evaluate_every=2", "--set", 'monitor.samples=["hi"]']
    code, stdout, err = run(
        "tune", "sft", "-m", models / "chat", "--data", chats, "--lora", 4, *QUICK, *samples, "-o", out
    )
    assert code == 0, err
    assert stdout.startswith(f"{out}: 4 steps, loss ")
    assert "of 8 trained" not in err
    assert "adapter default: rank 4 on " in err
    assert "step 4/4 (100%)  loss " in err
    assert "step 4: held out loss " in err
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "checkpoints",
        "curve.png", "curve.svg", "experiment.toml", "log.jsonl",
    ]  # fmt: skip
    assert [e["step"] for e in log(out) if "held_out" in e] == [0, 2, 4]
    assert [e["samples"][0]["prompt"] for e in log(out) if "samples" in e] == ["hi"]
    found = experiment.read(out / "experiment.toml")
    assert (found.optimizer.learning_rate, found.optimizer.weight_decay, found.steps) == (1e-2, 0.01, 4)
    card = (out / "README.md").read_text()
    assert all(
        part in card for part in ("LoRA of rank 4", "chats.jsonl", "12 records", "Gemma Terms of Use", "Held out")
    )
    code, _, err = run("generate", "-m", out, "hi", "-n", 3)
    assert code == 0, err
    assert gemkit.load(out).chat("hi", max_tokens=2, temperature=0).text is not None
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "chat", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, out)
    ids = torch.tensor([[2, *tokenizer().encode(WORDS)]])
    ours = gemkit.load(out, executor="torch").module(ids)
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)  # logits of up to 30, in another order


def test_all_weights_from_data_to_transformers(run, models, texts, tmp_path):
    out = tmp_path / "full"
    code, stdout, err = run("tune", "pretrain", "-m", models / "random", "--data", texts, *QUICK, "-o", out, "--json")
    assert code == 0, err
    told = json.loads(stdout)
    assert (told["step"], told["stopped"], told["folder"]) == (4, False, str(out))
    losses = [e["loss"] for e in log(out)]
    assert losses[-1] < losses[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    ids = torch.tensor([[2, *tokenizer().encode(WORDS)]])
    ours = gemkit.load(out, executor="torch").module(ids)
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)
    assert not torch.equal(ours, gemkit.load(models / "random", executor="torch").module(ids))


def test_a_new_model(run, texts, tmp_path):
    vocabulary = tokenizer()
    vocabulary.save(tmp_path / "tokenizer.model")
    (tmp_path / "tiny.toml").write_text(f"""
objective = "pretrain"
[model]
tokenizer = "{tmp_path / "tokenizer.model"}"
[model.new]
like = "gemma-3-270m"
width = 32
ffw_width = 64
heads = 2
kv_heads = 1
head_dim = 16
max_context = 64
layers = [{{kind = "sliding", window = 8}}, {{kind = "global"}}]
depth = 2
[save]
dtype = "bfloat16"
""")
    out = tmp_path / "new"
    code, _, err = run("tune", "--config", tmp_path / "tiny.toml", "--data", texts, *QUICK, "-o", out)
    assert code == 0, err
    assert tomllib.loads((out / "experiment.toml").read_text())["model"]["new"]["width"] == 32
    card = (out / "README.md").read_text()
    assert "none of Gemma's own are in it" in card
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    code, _, err = run("show", out)
    assert code == 0, err
    assert run("generate", "-m", out, "abc", "-n", 2)[0] == 0


@pytest.mark.parametrize(
    ("objective", "form", "extra"),
    [
        ("dpo", "preference", []),
        ("dpo", "preference", ["--lora", 2]),
        ("reward", "preference", []),
        ("distill", "text", ["--teacher", "TEACHER"]),
        (
            "rl",
            "prompt",
            ["--reward", "support.rewards:length", "--set", "options.max_tokens=4", "--set", "options.group=3"],
        ),
    ],
)
def test_other_objectives(run, models, tmp_path, objective, form, extra):
    record = {
        "preference": {"prompt": "abc", "chosen": "def", "rejected": "ghi"},
        "text": {"text": WORDS},
        "prompt": {"prompt": "abc", "answer": "a"},
    }[form]
    data = write_lines(tmp_path / "data.jsonl", [record] * 8)
    model = models / "random"
    extra = [str(part).replace("TEACHER", str(model)) for part in extra]
    out = tmp_path / "out"
    quick = ["--steps", 2, "--batch-size", 2, "--max-length", 64]
    code, _, err = run("tune", objective, "-m", model, "--data", data, *quick, *extra, "-o", out)
    assert code == 0, err
    assert len([e for e in log(out) if "loss" in e]) == 2
    assert run("generate", "-m", out, "abc", "-n", 2)[0] == 0


# ── killed ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(300)
def test_killed_runs_go_on_to_the_same_bits(tmp_path):
    """Two kills of a run of adapters with dropout; `kill_training.py` does twenty, of all weights too."""
    assert len(killing.check(tmp_path, lora=True, kills=2, seed=1)) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_process_that_is_asked_to_stop(tmp_path, times):
    """Once: it finishes the step, saves and exits with 0. Twice: it is gone at once."""
    killing.prepare(tmp_path)
    line = killing.command(tmp_path, "run", lora=False)
    line[line.index("--steps") + 1] = "100000"
    process = subprocess.Popen(
        line, env=killing.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while len(killing.entries(tmp_path / "run")) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if times == 2:
            while "once more to exit at once" not in (said := process.stderr.readline()) and said:
                pass
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if times == 1:
        assert process.returncode == 0, err
        assert "stopped after step" in out
        assert "gemkit tune --resume" in out
        steps = FileCheckpoints(tmp_path / "run" / "checkpoints").steps()
        assert steps[-1] == killing.entries(tmp_path / "run")[-1]["step"]
    else:  # the step may have ended between the two
        assert process.returncode in (-signal.SIGTERM, 0)


def test_a_finished_run_is_not_trained_again(run, models, texts, tmp_path):
    out = tmp_path / "out"
    assert run("tune", "pretrain", "-m", models / "random", "--data", texts, *QUICK, "-o", out)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    code, _, err = run("tune", "--resume", out)
    assert code == 0, err
    assert "going on from step 4 of 4" in err
    assert (out / "model.safetensors").read_bytes() == before


# ── plans ───────────────────────────────────────────────────────────────────────────────────────────────────────────


SMALL = ["--max-length", 64, "--set", "step.microbatch_tokens=64"]  # one sequence is computed


def test_a_plan(run, models, texts):
    arguments = ["pretrain", "-m", models / "random", "--data", texts, "--lora", 4, *SMALL, "--plan"]
    code, stdout, err = run("tune", *arguments)
    assert code == 0, err
    assert "12 records, 2 steps" in stdout
    assert all(f"\n{line}" in stdout for line in ("trained ", "weights ", "activations ", "peak memory ", "step "))
    code, stdout, _ = run("tune", *arguments, "--json")
    told = json.loads(stdout)
    assert code == 0
    account = gemkit.load(models / "random", executor="torch").enable_lora(4, quiet=True)
    assert told["trainable"] == account.parameters
    assert told["peak"] > told["weights"] + told["optimizer"] + max(told["activations"], told["loss"])


def test_what_cannot_fit_is_refused(run, models, texts, tmp_path, monkeypatch):
    from gemkit.train import run as runs

    monkeypatch.setattr(runs, "available_memory", lambda: 1_000_000)
    arguments = ["pretrain", "-m", models / "random", "--data", texts, *SMALL, "--lora", 4, "-o", tmp_path / "out"]
    code, _, err = run("tune", *arguments)
    assert code == 1
    assert "at its highest and 1.00 MB are free; not even" in err
    assert not (tmp_path / "out" / "log.jsonl").exists()


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sft --data DATA", "-o FOLDER: where the run is kept"),
        ("--data DATA -o OUT", "no objective: one of sft, pretrain"),
        ("sft -o OUT", "no data.train"),
        ("sft --data none.jsonl -o OUT", "none.jsonl"),
        ("dpo --data DATA -o OUT", "dpo learns from records of the form preference"),
        ("sft --data DATA -o OUT --lora 500", "rank=500 is larger than"),
        ("sft --data DATA -o OUT --lora 2 --set lora.targets=x_proj", "target 'x_proj' matches nothing"),
        ("sft --data DATA -o OUT --set options.smooth=1", "sft: there is no options.smooth; did you mean smoothing?"),
        ("sft --data DATA -o OUT --set optimizer.lr=1", "there is no optimizer.lr"),
        ("sft --data DATA -o OUT --max-length 9999", "data.max_length=9999 is beyond the 256 tokens"),
        ("sft --data DATA -o OUT --set model.freeze=visio", "model.freeze='visio' is the beginning of no weight"),
        ("sft --data DATA -o OUT --set save.dtype=float16", "save.dtype='float16' is not one of float32, bfloat16"),
        ("sft --data DATA -o DATA", "chats.jsonl"),
        ("distill --data DATA -o OUT", "distill has no teacher: options.teacher"),
        ("sft --data DATA -o OUT --reward support.rewards:length", "sft judges no answers"),
        ("--resume OUT", "holds no run"),
        ("sft --resume OUT", "goes on with what is in the folder"),
    ],
)
def test_mistakes(run, models, chats, tmp_path, arguments, message):
    names = {"DATA": str(chats), "OUT": str(tmp_path / "out")}
    model = [] if "--resume" in arguments else ["-m", models / "chat", "--max-length", 64]
    code, out, err = run("tune", *model, *(names.get(word, word) for word in arguments.split()))
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_broken_line_is_told_before_the_first_step(run, models, chats, tmp_path):
    lines = chats.read_text().splitlines()
    lines[6] = lines[6][:-5]
    chats.write_text("\n".join(lines) + "\n")
    code, _, err = run(
        "tune", "sft", "-m", models / "chat", "--data", chats, "--max-length", 64, "-o", tmp_path / "out"
    )
    assert code == 1
    assert f"{chats}:7" in err


def test_a_folder_that_is_not_empty(run, models, texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = run("tune", "pretrain", "-m", models / "random", "--data", texts, *QUICK, "-o", tmp_path / "out")
    assert code == 1
    assert "exists and is not empty: --resume" in err


@pytest.mark.parametrize("changed", ["model", "data", "setting"])
def test_going_on_with_something_else_is_refused(run, models, texts, tmp_path, changed):
    write(tmp_path / "model", "gemma-3-270m")
    out = tmp_path / "out"
    assert run("tune", "pretrain", "-m", tmp_path / "model", "--data", texts, *QUICK, "-o", out)[0] == 0
    extra = []
    if changed == "model":
        weights = tmp_path / "model" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
    elif changed == "data":
        write_lines(texts, [{"text": "other"}] * 12)
    else:
        extra = ["--set", "optimizer.weight_decay=0.5"]
    code, _, err = run("tune", "--resume", out, *extra)
    assert code == 1
    named = {"model": "the model", "data": "the data", "setting": "optimizer"}[changed]
    assert f"TrainingError: {named} is not what the checkpoint of step 4 was made with" in err
    assert "--force goes on anyway" in err
    assert run("tune", "--resume", out, *extra, "--force")[0] == 0


def test_two_processes_in_one_folder(models, texts, tmp_path):
    from gemkit.errors import TrainingError
    from gemkit.train.process import Process
    from gemkit.train.run import Run

    named = [f"model.name={models / 'random'}", f"data.train={texts}", "data.max_length=64"]
    asked = experiment.set_fields(experiment.Experiment("pretrain"), named)
    with Run.start(asked, tmp_path / "out") as one, Run.start(asked, tmp_path / "out") as other, one._alone(Process()):
        refused = pytest.raises(TrainingError, match="another process is training in")
        with refused:
            other.train()

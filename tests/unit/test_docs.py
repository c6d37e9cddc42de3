"""The pages of docs/ against the code: what they name exists, what is made is up to date, what they count is real."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gemkit
from gemkit import family, ops, text
from gemkit.executors.native import library
from gemkit.executors.native.lower import OPS
from gemkit.generate import Chunk, sample
from gemkit.generate.sampler import GREEDY, token_logprob
from gemkit.train.experiment import Experiment
from gemkit.train.tables import to_tables
from gemkit.weights.checkpoint import find
from gemkit.weights.fit import SCORE
from gemkit.weights.maps import name_map
from support.outputs import dense

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MEMBER = family.get("gemma-3-270m").decoder  # whose parameters the pages follow

spec = importlib.util.spec_from_file_location("make_tables", DOCS / "make_tables.py")
assert spec is not None
assert spec.loader is not None
make_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tables)


# ---------------------------------------------------------------- what is made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_made_parts_are_up_to_date(page):
    assert page.read_text() == make_tables.render(page.read_text()), "run `make docs`"


def test_every_table_has_its_place():
    places = re.findall(r"<!-- made: (\w+) -->", "".join(page.read_text() for page in PAGES))
    assert sorted(places) == sorted(make_tables.MAKERS)


def test_every_member_and_every_verb_is_there():
    members, verbs = (DOCS / "family.md").read_text(), (DOCS / "cli.md").read_text()
    assert all(f"| `{name}` |" in members for name in family.names())
    assert all(f"## gemkit {name}\n" in verbs for name in VERBS)
    assert "--repetition-penalty X" in verbs


# ---------------------------------------------------------------- what is named


def written(page: str) -> str:
    """What was written by hand in prose: without made parts and fenced blocks."""
    page = re.sub(r"<!-- made.*?<!-- end -->", "", page, flags=re.DOTALL)
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def problem(name: str) -> str | None:
    """What is wrong with a name between backticks; None if it exists, or is no name of ours."""
    if "::" in name:
        path, _, function = name.partition("::")
        found = (ROOT / path).is_file() and f"def {function}(" in (ROOT / path).read_text()
        return None if found else "no such test"
    if re.fullmatch(r"[\w./-]*/[\w.-]*|[\w.-]+\.(py|md)", name):
        return None if any((base / name).exists() for base in (ROOT, ROOT / "src" / "gemkit", DOCS)) else "no such file"
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name):
        known = name in PARAMETERS or re.fullmatch(FILES, name) or name in FIELDS or _resolves(name)
        return None if known else "neither code nor a parameter nor a file"
    if name.startswith(("gemkit ", "make ")):
        return _command_problem(name)
    return None


FILES = r"[\w-]+\.(json|jsonl|model|safetensors|gguf|ckpt|svg|toml|jinja)"


def _fields(tables: dict, path: str = "") -> Iterator[str]:
    """Dotted names of the fields of an experiment."""
    for name, value in tables.items():
        yield path + name
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{name}.")


def _resolves(name: str) -> bool:
    """Whether a dotted name leads from `gemkit`, or from torch, to something."""
    top = "torch" if name.startswith("torch.") else "gemkit"
    parts = name.removeprefix(f"{top}.").split(".")
    for count in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join([top, *parts[:count]]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def _command_problem(line: str) -> str | None:
    if line.startswith("make "):
        target = line.split()[1]
        return None if f"\n{target}:" in (ROOT / "Makefile").read_text() else "no such target"
    verb, *words = line.split()[1:]
    if verb not in VERBS:
        return None if verb == "VERB" else "no such verb"
    options = VERBS[verb]._option_string_actions
    unknown = [word for word in words if word.startswith("-") and word not in options]
    return f"no option {unknown[0]}" if unknown else None


def _published() -> Iterator[str]:
    """Names of parameters and the modules they are in: ours, with and without the layer, and those of each format."""
    ours = [name for name, _ in family.parameters(MEMBER)]
    yield from ours
    yield "lm_head.weight"
    yield SCORE
    for name in ours:
        path = name.removesuffix(".weight")
        yield path
        yield re.sub(r"^layers\.\d+\.", "", path)
    for format in ("safetensors", "gguf", "ckpt"):
        table = name_map(format, MEMBER)
        yield from (table.file_name(name) for name in ours)


PARAMETERS = set(_published())
FIELDS = {*_fields(to_tables(Experiment())), "options.teacher", "options.reward"}
VERBS = make_tables.parsers()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_exists(page):
    names = re.findall(r"`([^`\n]+)`", written(page.read_text()))
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        names += re.findall(r"^ *(gemkit .*)$", block, flags=re.MULTILINE)
    assert names
    assert {name: what for name in names if (what := problem(name))} == {}


@pytest.mark.parametrize(
    "name",
    [
        "nn/encoder.py",
        "missing.py",
        "nn.decoder.Encoder",
        "step.max_token",
        "wieghts.load.load_module",
        "layers.0.self_attn.w_proj.weight",
        "tests/parity/test_decoder.py::test_nothing",
        "tests/parity/test_nothing.py::test_whole_prompt_matches",
        "gemkit explode",
        "gemkit show --explode",
        "make explode",
    ],
)
def test_what_does_not_exist_is_found(name):
    assert problem(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (DOCS / target).is_file(), target


def test_the_index_lists_every_page():
    linked = re.findall(r"\| \[[^]]+\]\(([^)]+)\)", (DOCS / "README.md").read_text())
    assert sorted(linked) == sorted(page.name for page in PAGES if page.name != "README.md")


# ---------------------------------------------------------------- the two walks, on the real model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    return gemkit.load(executor="torch")  # the one whose ops can be watched


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple[int, ...], int, int | None, float]]:
    """Every op that runs: name, shape and bytes of the result, bytes of the weight, largest number of the result."""
    made = []

    def watched(name, op):
        def run(*args, **kwargs):
            result = op(*args, **kwargs)
            parts = result if isinstance(result, tuple) else (result,)
            weight = args[1].nbytes if name in ("linear", "rms_norm") else None
            if name == "embed":
                weight = args[1].rows(args[0]).shape[0] * args[1].nbytes // args[1].shape[0]
            peak = parts[0].abs().max().item()
            made.append((name, tuple(parts[0].shape), sum(p.nbytes for p in parts), weight, peak))
            return result

        return run

    for name in ops.__all__:
        if callable(op := getattr(ops, name)) and not isinstance(op, type) and name != "attention_kernel":
            monkeypatch.setattr(ops, name, watched(name, op))
    return made


def rows(page: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of every table row that matches."""
    return re.findall(rf"^\| {pattern} \|$", page, flags=re.MULTILINE)


def number(written: str) -> int:
    return int(written.replace(",", ""))


@pytest.mark.real
def test_the_token_walk(model, calls):
    page = (DOCS / "follow-a-token.md").read_text()
    tokenizer = model.tokenizer

    prompt = text.complete(tokenizer, PROMPT)
    pieces = rows(page, r"(\d) \| (\d+) \| `([^`]+)` \| (.+)")
    assert [int(i) for _, i, _, _ in pieces] == prompt.ids
    assert [piece for _, _, piece, _ in pieces] == [tokenizer.piece(i) for i in prompt.ids]
    assert [written for *_, written in pieces[1:]] == [tokenizer.bytes(i).hex(" ") for i in prompt.ids[1:]]
    spelled = " ".join(map(str, tokenizer.encode("<start_of_turn>")))
    assert spelled in page
    assert f"the one id {tokenizer.id('<start_of_turn>')}" in page

    state = model.executor.new_state(1)
    logits = dense(model.executor, [Chunk(0, prompt.ids)], state)
    table = rows(page, r"(\d+) \| `ops\.(\w+)` \|[^|]*\|[^|]*\| \(([\d, ]+)\) \| ([\d,]+) \|(?: ([\d,]+))?")
    places = [int(place) for place, *_ in table]
    assert places == [*range(1, 27), *range(len(calls) - 2, len(calls) + 1)]
    for place, op, shape, nbytes, weight in table:
        name, real_shape, real_bytes, real_weight, _ = calls[int(place) - 1]
        assert (op, tuple(map(int, shape.split(", ")))) == (name, real_shape), place
        assert number(nbytes) == real_bytes, place
        assert (number(weight) if weight else None) == real_weight, place
    for block in range(len(model.config.layers)):  # "the same 23 ops"
        assert [c[:2] for c in calls[3 + 23 * block : 26 + 23 * block]] == [c[:2] for c in calls[3:26]]
    peaks = [calls[place - 1][-1] for place in (1, 26, 417)]
    assert "Its largest number is {:.0f} after the embedding, {:,.0f} after block 0 and {:,.0f}".format(*peaks) in page
    assert peaks[-1] > float(np.finfo(np.float16).max)

    per_token = state.layers[0].read(0)[0][0].nbytes * 2 * len(state.layers)
    for amount in (per_token, per_token * len(prompt), state.nbytes):
        assert f"{amount:,}" in page
    best = token_logprob(logits[0], 0, top=5).top
    assert rows(page, r"(\d+) \| `([^`]+)` \| ([\d.]+) \| ([\d.]+) %") == [
        (str(i), tokenizer.piece(i), f"{logits[0, i]:.2f}", f"{100 * np.exp(logprob):.1f}") for i, logprob in best
    ]

    drawn = [sample(logits[0], GREEDY)]
    for _ in range(2):
        drawn.append(sample(dense(model.executor, [Chunk(0, drawn[-1:])], state)[0], GREEDY))
    assert f"turns {drawn[0]} into the bytes {tokenizer.bytes(drawn[0]).hex(' ')}" in page
    assert "ids are {} (`{}`) and {} (`{}`)".format(
        *(x for i in drawn[1:] for x in (i, tokenizer.piece(i)))
    ) in " ".join(page.split())
    *held, last = tokenizer.encode("𓀀")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (*held, last)] == ["", "", "", "𓀀"]
    assert f"𓀀 is {' '.join(map(str, [*held, last]))}" in page


@pytest.mark.real
def test_the_native_walk():
    """The steps of the default executor, where it is installed, as the page lists them."""
    able, why = library.available()
    assert able, why
    page = (DOCS / "follow-a-token.md").read_text()
    executor = gemkit.load(executor="native").executor
    names = [OPS[step[0]] for step in executor.pack.steps.tolist()]
    table = rows(page, r"(\d+) \| `(\w+)` \| ([\d, ]*)\|.*")
    places = [int(place) for place, *_ in table]
    assert places == [*range(1, 25), *range(len(names) - 3, len(names) + 1)]
    assert [name for _, name, _ in table] == [names[place - 1] for place in places]
    for block in range(18):  # "the same 21 steps"
        assert names[3 + 21 * block : 24 + 21 * block] == names[3:24]
    assert f"{len(names)} steps over {len(executor.pack.buffers)} buffers" in page
    ops_done = sorted(int(op) for *_, done in table for op in done.split(",") if op.strip())
    assert ops_done == sorted({*range(1, 27), 418, 419, 420} - {6, 8, 10, 16})
    state = executor.new_state(1)
    executor.run([Chunk(0, gemkit.load(executor="native").tokenizer.encode(PROMPT))], state)
    assert f"in float16, {state.nbytes // 18:,} bytes each: {state.nbytes:,}" in page


@pytest.mark.real
def test_the_weight_walk(model):
    page = " ".join((DOCS / "follow-a-weight.md").read_text().split())
    with find(None) as checkpoint:
        reader = checkpoint.reader
        size = checkpoint.place.path.stat().st_size
        entry = reader.entries["blk.0.attn_q.weight"]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            block = file.read(22).hex(" ")
        weight = reader.read(entry.name)
        stored = reader.read("blk.0.attn_norm.weight")[:3].tolist()
    assert f"{size:,} bytes" in page
    assert f"{len(reader.metadata)} keys of metadata and {len(reader.entries)} tensors" in page
    assert f"{entry.name} {entry.dtype} {entry.shape} {entry.nbytes:,} bytes at {entry.offset:,}" in page
    assert block in page.replace("| ", "")
    scale = weight.planes["scales"][0, 0].item()
    assert f"{scale:.6f}" in page
    for code, value in zip((14, 20), weight.dequantize()[0, :2].tolist(), strict=True):
        assert f"({code} - 16) * {scale:.6f} = {value:.6f}" in page
        assert value == (code - 16) * scale
    planes = rows((DOCS / "follow-a-weight.md").read_text(), r"`(\w+)` \| \((\d+), (\d+)\) \| (\w+) \| ([\d,]+) \| .*")
    assert [(name, (int(n), int(m)), dtype, number(nbytes)) for name, n, m, dtype, nbytes in planes] == [
        (name, tuple(plane.shape), str(plane.dtype).removeprefix("torch."), plane.nbytes)
        for name, plane in weight.planes.items()
    ]
    held = model.module.layers[0].input_layernorm.weight[:3].tolist()
    assert "begins {:g}, {:g}, {:g} in the file and {:g}, {:g}, {:g} in memory".format(*stored, *held) in page
    assert f"with {model.report.nbytes:,} bytes of weights in memory" in page
    assert f"become {4 * weight.shape[0] * weight.shape[1]:,}" in page

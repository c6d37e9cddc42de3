"""Spellings of names on the hub, and the GGUF of a repository that one means."""

import pytest

from gemkit.errors import WeightsError
from gemkit.weights.hub_names import HubName, choose, parse

REPO = "someone/gemma-3-270m-it-GGUF"
FILE = "Q8_0/it-Q8_0-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (REPO, HubName(REPO)),
        (f"{REPO}:Q4_K_M", HubName(REPO, tag="Q4_K_M")),
        (f"{REPO}:latest", HubName(REPO)),
        (f"{REPO}@v1.0", HubName(REPO, "v1.0")),
        (f"{REPO}@abc:UD-Q4_K_XL", HubName(REPO, "abc", "UD-Q4_K_XL")),
        (f"hf.co/{REPO}", HubName(REPO)),
        (f"hf.co/{REPO}:q4_0", HubName(REPO, tag="q4_0")),
        (f"huggingface.co/{REPO}:Q4_0", HubName(REPO, tag="Q4_0")),
        (f"https://huggingface.co/{REPO}", HubName(REPO)),
        (f"https://huggingface.co/{REPO}/", HubName(REPO)),
        (f"https://hf.co/{REPO}?library=transformers", HubName(REPO)),
        (f"https://huggingface.co/{REPO}/tree/main", HubName(REPO, "main")),
        (f"https://huggingface.co/{REPO}/blob/main/it-Q4_0.gguf", HubName(REPO, "main", file="it-Q4_0.gguf")),
        (f"https://huggingface.co/{REPO}/resolve/abc/{FILE}?download=true", HubName(REPO, "abc", file=FILE)),
        (f"https://huggingface.co/{REPO}/resolve/main/it%20Q4_0.gguf", HubName(REPO, "main", file="it Q4_0.gguf")),
    ],
)
def test_every_spelling_means_one_thing(name, wanted):
    assert parse(name) == wanted
    assert parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    "name",
    [
        *("gemma3:1b", "a/b/c", "a/b:", "a/b@", "a/b:c:d/e", "a--b/c", "../b", "a/..:Q4_0", "a/b@../c"),
        *("https://example.org/a/b", "file:///a/b", "ftp://hf.co/a/b", "https://hf.co/a", "https://hf.co/datasets/a/b"),
        "https://hf.co/a/b/resolve/main/../../x.gguf",
        "https://hf.co/a/b/resolve/main/%2e%2e/x.gguf",
        "https://hf.co/a/b/blob/main/.hidden.gguf",
        "https://hf.co/a/b/tree/main/folder",
        "https://hf.co/a/b/discussions/1",
    ],
)
def test_what_is_no_name(name):
    assert parse(name) is None


def test_another_hub_by_its_address(monkeypatch):
    assert parse("http://localhost:8080/a/b") is None
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:8080")
    assert parse("http://localhost:8080/a/b/blob/main/x.gguf") == HubName("a/b", "main", file="x.gguf")


FILES = [
    *("README.md", "config.json", "mmproj-model-f16.gguf", "gemma-3-it-Q4_0.gguf", "gemma-3-it-qat-Q4_0.gguf"),
    *("gemma-3-it-Q4_K_M.gguf", "gemma-3-it-UD-Q4_K_XL.gguf", "gemma-3-it.bf16.gguf", "it-q5_k_s.gguf"),
    *("Q8_0/it-Q8_0-00001-of-00002.gguf", "Q8_0/it-Q8_0-00002-of-00002.gguf", "F16/model.gguf"),
]


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "gemma-3-it-Q4_K_M.gguf"),
        ("q4_k_m", "gemma-3-it-Q4_K_M.gguf"),
        ("Q4_0", "gemma-3-it-Q4_0.gguf"),
        ("qat-Q4_0", "gemma-3-it-qat-Q4_0.gguf"),
        ("UD-Q4_K_XL", "gemma-3-it-UD-Q4_K_XL.gguf"),
        ("BF16", "gemma-3-it.bf16.gguf"),
        ("Q5_K_S", "it-q5_k_s.gguf"),
        ("Q8_0", "Q8_0/it-Q8_0-00001-of-00002.gguf"),
        ("F16", "F16/model.gguf"),
    ],
)
def test_a_quantization_is_a_file(tag, file):
    assert choose(HubName("a/b", tag=tag), FILES) == file


def test_the_only_one_needs_no_quantization():
    assert choose(HubName("a/b"), ["x-Q4_0.gguf", "mmproj-x.gguf", "README.md"]) == "x-Q4_0.gguf"
    assert choose(HubName("a/b"), FILES[9:11]) == FILES[9]


def test_several_are_listed_to_choose_from():
    with pytest.raises(WeightsError, match=r"a/b holds 8 GGUF files; name one by .*a/b:Q4_K_M, .*Q8_0"):
        choose(HubName("a/b"), FILES)
    with pytest.raises(WeightsError, match=r"a/b@v holds no GGUF file of the quantization Q6_K; there are: a/b@v:"):
        choose(HubName("a/b", "v", "Q6_K"), FILES)
    with pytest.raises(WeightsError, match="a/b holds no GGUF of a model"):
        choose(HubName("a/b", tag="Q4_0"), ["README.md", "mmproj-x.gguf"])

"""The other published formats: the same weights, the same numbers, whichever file they came from."""

from dataclasses import replace

import gguf
import pytest
import torch

from gemkit import family
from gemkit.nn import Batch
from gemkit.ops import Quantized
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module
from support.gguf_files import ARCHITECTURES, small, tiny_file
from support.tiny import WINDOW, assert_close, load, reference, tiny, tokens

KINDS = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(name, kind, tmp_path):
    config, path = small(name), tmp_path / "tiny.gguf"
    theirs = tiny_file(path, name, kind)
    ours = load(path, dtype="float32")
    assert ours.config == config  # metadata and implied settings give the same architecture
    if kind.name.startswith("Q"):
        assert isinstance(ours.layers[0].mlp.up_proj.weight, Quantized)
        assert ours.embed_tokens.weight is ours.lm_head.weight
    ids = tokens(3 * WINDOW + 5)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])
        dense = load(path, dtype="float32", quantized=False)
        assert not any(isinstance(m.weight, Quantized) for m in dense.modules() if hasattr(m, "weight"))
        assert_close(dense(Batch.of([ids])), theirs(ids[None]).logits[0])


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b"])
def test_gemma_pytorch_checkpoint(name, tmp_path, monkeypatch):
    """google/gemma_pytorch: one file, q, k and v as rows of one matrix, rotary tables among the tensors, no config.

    The architecture follows from the shapes, so the tiny one stands in for the member in the registry."""
    config = tiny(name)
    theirs = reference(config)
    state = {}
    for key, value in theirs.model.state_dict().items():
        if ".q_proj" in key:
            parts = [theirs.model.state_dict()[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            state["model." + key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif key == "embed_tokens.weight":
            state["embedder.weight"] = value
        elif ".k_proj" not in key and ".v_proj" not in key:
            state["model." + key.replace("q_norm", "query_norm").replace("k_norm", "key_norm")] = value
    state["local_freqs_cis" if name == "gemma-3-1b" else "freqs_cis"] = torch.ones(4, 2, dtype=torch.complex64)
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")

    members = tuple(replace(m, decoder=config) if m is family.get(name) else m for m in family.members())
    monkeypatch.setattr(family, "members", lambda: members)
    ours = load(tmp_path / "model.ckpt")
    assert ours.config == config
    ids = tokens(3 * WINDOW + 5)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_text_part_of_an_image_checkpoint(prefix, tmp_path):
    """Gemma 3 from 4B up is published with an image tower; its text decoder loads from old and new names."""
    import json

    from safetensors.torch import save_file

    theirs = reference(tiny("gemma-3-4b"))
    tensors = {prefix + k: v for k, v in theirs.model.state_dict().items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(4)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": theirs.config.to_dict(), "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with find(tmp_path) as checkpoint:
        ours, report = load_module(checkpoint)
    assert any("image tower" in note for note in report.notes)
    ids = tokens(3 * WINDOW)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])


def test_a_published_copy_of_the_tied_head_must_be_one(tmp_path):
    from safetensors.torch import load_file, save_file

    from gemkit.errors import WeightsError

    reference(tiny("gemma-2b")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    load(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)


def test_what_was_rounded_is_reported(tmp_path):
    reference(tiny("gemma-2b")).save_pretrained(tmp_path)
    with find(tmp_path) as checkpoint:
        assert load_module(checkpoint)[1].notes == []
        module, report = load_module(checkpoint, dtype="bfloat16")
    count = len(list(module.parameters()))
    assert report.notes == [f"{count} weights were rounded from float32 to bfloat16"]
    assert report.nbytes == sum(p.nbytes for p in module.parameters())

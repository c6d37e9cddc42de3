"""RecurrentGemma against DeepMind's own PyTorch code, through its own file format, and where Transformers differs."""

from dataclasses import replace

import pytest
import torch
import transformers

from gemkit import family, ops
from gemkit.errors import GemkitError
from gemkit.family import DecoderConfig, replace_layers
from gemkit.inspect import cost
from gemkit.nn import Batch
from gemkit.nn import Decoder as Module
from gemkit.weights import config_hf
from support.deepmind import Reference, layers
from support.tiny import WINDOW, as_trained, assert_close, load, reference, save_reference, tiny, tokens

NAMES = ["recurrentgemma-2b", "recurrentgemma-9b"]


def wider_recurrence(decoder: DecoderConfig) -> DecoderConfig:
    """The recurrence twice as wide as the residual stream, which no published member has but the layout allows."""
    return replace_layers(decoder, recurrent={"width": 2 * decoder.width})


def from_deepmind(theirs: Reference, decoder: DecoderConfig, folder, monkeypatch, name: str = NAMES[0]) -> Module:
    """Ours, from the file that their code saves. The architecture follows from its shapes, so the tiny one stands in
    for the member in the registry."""
    folder.mkdir(exist_ok=True)
    torch.save(theirs.model.state_dict(), folder / "2b.pt")
    members = tuple(replace(m, decoder=decoder) if m is family.get(name) else m for m in family.members())
    with monkeypatch.context() as patch:
        patch.setattr(family, "members", lambda: members)
        ours = load(folder / "2b.pt")
    assert ours.config == decoder
    return ours


@pytest.fixture(scope="module", params=[*NAMES, "wider"])
def pair(request, tmp_path_factory):
    wider = request.param == "wider"
    decoder = wider_recurrence(tiny(NAMES[0])) if wider else tiny(request.param)
    theirs = Reference(decoder)
    name = NAMES[0] if wider else request.param
    with pytest.MonkeyPatch.context() as patch:
        return from_deepmind(theirs, decoder, tmp_path_factory.mktemp(request.param), patch, name), theirs


@torch.inference_mode()
def test_whole_prompt_matches(pair):
    ours, theirs = pair
    ids = tokens(3 * WINDOW + 5)[0]  # longer than three windows
    assert_close(ours(Batch.of([ids])), theirs(ids))


@torch.inference_mode()
def test_prefill_then_decode_matches(pair):
    """Prompts shorter than the window, and two and more windows long; then one by one."""
    ours, theirs = pair
    ids = tokens(4 * WINDOW)[0]
    for prompt in (2, WINDOW, 2 * WINDOW + 3):
        state = ours.new_state()
        rows = [ours(Batch.of([ids[:prompt]]), state)]
        rows += [ours(Batch.of([ids[i : i + 1]], offsets=[i]), state) for i in range(prompt, len(ids))]
        assert_close(torch.cat(rows), theirs.step_by_step(ids, prompt))


@torch.inference_mode()
def test_ragged_batch_matches_their_left_padded_one(pair):
    """Their pads leak into nothing: the mask of attention and the resets hide them. Ours has none."""
    ours, theirs = pair
    sequences = tokens(3 * WINDOW + 1, 7, 1)
    logits = ours(Batch.of(sequences)).split([len(s) for s in sequences])
    for got, expected in zip(logits, theirs.left_padded(sequences), strict=True):
        assert_close(got, expected)


def test_gradients_match(tmp_path, monkeypatch):
    """Every weight's gradient of a training loss."""
    decoder = tiny(NAMES[0])
    theirs = Reference(decoder)
    ours = from_deepmind(theirs, decoder, tmp_path, monkeypatch).requires_grad_(True)
    ids = tokens(2 * WINDOW + 3)[0]
    for logits in (ours(Batch.of([ids])), theirs(ids)):
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    grads = Reference(decoder)  # their gradients take the way of their weights: through the file, into our names
    grads.model.load_state_dict({n: p.grad for n, p in theirs.model.named_parameters()})
    expected = dict(from_deepmind(grads, decoder, tmp_path, monkeypatch).named_parameters())
    for name, p in ours.named_parameters():
        assert_close(p.grad, expected[name], 1e-4)  # a gradient is a longer chain of float32 sums than a logit


def test_the_square_root_has_their_bounded_derivative():
    """With decays within 1e-9 of 1 the plain derivative is beyond 1000; both are clipped there."""
    torch.manual_seed(0)
    width = 8
    unit = layers.RGLRU(width, num_heads=1)
    with torch.no_grad():
        unit.a_param.copy_(torch.linspace(-22, -12, width))  # softplus from 3e-10 to 6e-6
    x = torch.randn(5, width)
    theirs = unit(x[None], torch.arange(5)[None])[0][0]
    theirs.sum().backward()
    param = unit.a_param.detach().clone().requires_grad_(True)
    gates = [ops.block_linear(x, gate.w.detach(), gate.b.detach()) for gate in (unit.input_gate, unit.a_gate)]
    ours = ops.rg_lru(x, *gates, param, Batch.of([[0] * 5]))
    ours.sum().backward()
    # 1 - a^2 is exact with us and a multiple of 6e-8 with them, whose root is off by up to 2e-4
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
    torch.testing.assert_close(param.grad[:3], unit.a_param.grad[:3], rtol=1e-3, atol=0)


@torch.inference_mode()
def test_transformers_shows_one_token_fewer_than_deepmind(tmp_path):
    """The models were trained with DeepMind's mask, which lets a token see `attention_window_size` others besides
    itself. Transformers counts the token among them: it agrees up to that position, and everywhere with one more."""
    theirs = reference(tiny(NAMES[0]))
    ours = load(save_reference(theirs, tmp_path))
    ids = tokens(3 * WINDOW)[0]
    logits = ours(Batch.of([ids]))
    short = theirs(ids[None]).logits[0]
    assert theirs.config.attention_window_size == WINDOW - 1
    assert_close(logits[: WINDOW - 1], short[: WINDOW - 1])
    off = (logits - short).abs().amax(-1) / short.abs().max()
    assert (off[WINDOW - 1 :] > 1e-3).all()
    assert_close(logits, as_trained(theirs)(ids[None]).logits[0])


@torch.inference_mode()
def test_transformers_lets_pads_into_the_convolution(tmp_path):
    """In a left-padded batch its first real tokens see pads through the convolution; DeepMind's and ours do not."""
    theirs = reference(tiny(NAMES[0]))
    ours = load(save_reference(theirs, tmp_path))
    as_trained(theirs)
    ids = tokens(6)[0]
    padded = torch.cat([torch.full((3,), 5), ids])[None]
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = torch.tensor([[0, 0, 0, *range(6)]])
    logits = theirs(padded, attention_mask=mask, position_ids=positions).logits[0, 3:]
    alone = theirs(ids[None]).logits[0]
    assert_close(ours(Batch.of([[5] * 3, ids]))[3:], alone)
    assert (logits - alone).abs().max() > 1e-3 * alone.abs().max()


# The released files, by their own keys: versions 4.40 (2B), 4.42 (9B) and 5 of Transformers wrote these.
PUBLISHED = {
    "model_type": "recurrent_gemma",
    "hidden_size": 2560,
    "intermediate_size": 15_360,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "num_hidden_layers": 26,
    "vocab_size": 256_000,
    "lru_width": 2560,
    "attention_window_size": 2048,
    "logits_soft_cap": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "embeddings_scale_by_sqrt_dim": True,
}
PUBLISHED_9B = {
    **PUBLISHED,
    "hidden_size": 4096,
    "intermediate_size": 24_576,
    "num_attention_heads": 16,
    "num_hidden_layers": 38,
    "lru_width": None,
}
PATTERN = ["recurrent", "recurrent", "attention"]
LINEAR = ["linear_attention", "linear_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({**PUBLISHED, "block_types": PATTERN, "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}, NAMES[0]),
        ({**PUBLISHED, "_block_types": PATTERN, "head_dim": 256, "conv1d_width": 4}, NAMES[0]),
        ({**PUBLISHED_9B, "_block_types": PATTERN}, NAMES[1]),
        ({**PUBLISHED_9B, "layers_block_type": (LINEAR * 13)[:38], "block_types": PATTERN}, NAMES[1]),
        ({**PUBLISHED, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}, NAMES[0]),
        (transformers.RecurrentGemmaConfig(intermediate_size=15_360, num_key_value_heads=1).to_dict(), NAMES[0]),
    ],
)
def test_configurations_of_all_versions_are_read(config, name):
    decoder = family.get(name).decoder
    assert config_hf.from_hf(config, "config.json") == decoder
    assert config_hf.from_hf(config_hf.to_hf(decoder), "config.json") == decoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim=False"),
        ({"block_types": ["recurrent", "mamba"]}, "block_types has 'mamba'"),
        ({"block_types": []}, "must list kinds of layers"),
        ({"_block_types": "recurrent"}, "_block_types must list kinds of layers"),
        ({"intermediate_size": 15_361}, "2 intermediate_size=15361"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 must divide hidden_size=2560"),
        ({"lru_width": 2561}, "num_blocks must divide width"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"logits_soft_cap": 0.0}, "final_softcap=0.0 must be positive"),
    ],
)
def test_configurations_that_are_not_implemented_are_refused(change, message):
    with pytest.raises(GemkitError, match=message):
        config_hf.from_hf({**PUBLISHED, **change}, "config.json")


def test_what_no_configuration_says_is_refused():
    decoder = tiny(NAMES[0])
    for change in ({"biases": False}, {"embed_scale_dtype": "run"}, {"post_norms": True}, {"final_softcap": None}):
        with pytest.raises(GemkitError, match=r"recurrent_gemma|logits_soft_cap"):
            config_hf.to_hf(replace(decoder, **change))
    first, second = decoder.layers[:2]
    mixed = replace(decoder, layers=(first, replace(second, mixer=replace(second.mixer, conv_width=3))))
    with pytest.raises(GemkitError, match="no published configuration"):
        config_hf.to_hf(mixed)


def test_another_members_file_is_refused_by_name(tmp_path):
    theirs = Reference(replace(tiny(NAMES[0]), layers=tiny(NAMES[0]).layers[:4]))
    torch.save(theirs.model.state_dict(), tmp_path / "2b.pt")
    with pytest.raises(GemkitError, match="tensors are those of no member"):
        load(tmp_path / "2b.pt")


@torch.inference_mode()
def test_the_state_is_as_large_as_the_cost_model_says():
    decoder = tiny(NAMES[0])
    module = Module(decoder).to(torch.bfloat16)
    state = module.new_state()
    sizes = set()
    for chunk in (1, 2, 40):
        module(Batch.of([[1] * chunk], offsets=[state.lengths[0]]), state)
        entries = zip(state.layers, decoder.layers, strict=True)
        sizes.add(sum(entry.held(0).nbytes for entry, layer in entries if layer.mixer.kind == "recurrent"))
    assert sizes == {cost.state_bytes(decoder, 0).recurrent}


@torch.inference_mode()
def test_bfloat16_agrees_within_its_rounding(tmp_path, monkeypatch):
    """Theirs computes gates and decays in bf16 too; ours, in float32, is to be closer to the float32 answer."""
    decoder = tiny(NAMES[0])
    theirs = Reference(decoder)
    theirs.model.bfloat16()
    exact = from_deepmind(theirs, decoder, tmp_path, monkeypatch).float()
    ours = from_deepmind(theirs, decoder, tmp_path, monkeypatch)
    assert ours.norm.weight.dtype == torch.bfloat16
    ids = tokens(3 * WINDOW)[0]
    expected = exact(Batch.of([ids]))
    ours_off = (ours(Batch.of([ids])).float() - expected).abs().mean()
    theirs_off = (theirs(ids).float() - expected).abs().mean()
    assert ours_off <= theirs_off


@pytest.mark.parametrize("change", [{"window": WINDOW - 1}, {"window": WINDOW + 1}])
@torch.inference_mode()
def test_the_tolerance_would_notice(pair, change):
    ours, theirs = pair
    changed = Module(replace_layers(ours.config, attention=change))
    changed.load_state_dict(ours.state_dict())
    ids = tokens(3 * WINDOW + 5)[0]
    with pytest.raises(AssertionError, match="of the largest logit"):
        assert_close(changed(Batch.of([ids])), theirs(ids), 2e-4)

"""The native executor of a model that is changed: adapters, trained weights, and nothing packed twice."""

import warnings

import numpy as np
import pytest
import torch

import gemkit
from gemkit import nn
from gemkit.adapters.lora import enable_lora
from gemkit.adapters.merge import merge, unmerge
from gemkit.adapters.registry import remove, set_strength
from gemkit.errors import ModelError, WeightsError
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.native.packfile import Pack
from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Chunk
from gemkit.runtime.repack import Repacker
from gemkit.text.prompts import next_turn
from support.native_models import randomised
from support.outputs import dense
from support.tiny_models import write

IDS = [2, 11, 5, 17, 3, 29, 8, 13]


def logits(executor) -> np.ndarray:
    return dense(executor, [Chunk(0, IDS, len(IDS))], executor.new_state(1))


def trained(module: nn.Decoder, name: str = "default") -> None:
    """As after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if path.endswith(f".adapters.{name}.lora_B.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def followed(module: nn.Decoder) -> Repacker:
    return Repacker(module, NativeExecutor(module.config, pack(module)))


def own_bytes(native: NativeExecutor) -> dict[str, int]:
    """What the packed model holds itself, and does not take from the one below."""
    return {entry.name: entry.nbytes for entry in native.pack.table if entry.nbytes}


def agree(native: NativeExecutor, module: nn.Decoder) -> None:
    """As near as keys and values in float16 let them be, and for quantized weights activations in int8."""
    ours, theirs = logits(native), logits(TorchExecutor(module))
    quantized = isinstance(module.decoder.embed_tokens.weight, gemkit.ops.Quantized)
    assert np.abs(ours - theirs).max() <= (0.1 if quantized else 5e-3) * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("name", "quantized"),
    [("gemma-2b", False), ("gemma-2-2b", True), ("gemma-3-1b", True), ("recurrentgemma-2b", False)],
)
def test_an_adapter_is_run_and_nothing_else_is_packed(name, quantized):
    module = randomised(name, quantized)
    following = followed(module)
    base = following.executor()
    before = logits(base)
    enable_lora(module, 3, alpha=4.5, targets=["all-linear", "embed_tokens", "lm_head"])
    # nothing is added yet; where the base is dense, A and B stand beside it in one product and change no bit either
    assert np.array_equal(logits(following.executor()), before)
    trained(module)
    after = following.executor()
    assert np.abs(logits(after) - before).max() > 0.05 * np.abs(before).max()
    agree(after, module)
    own = own_bytes(after)
    assert own
    assert all(".adapters.default." in weight for weight in own)
    assert following.executor() is after
    set_strength(module, 0.0)
    assert np.array_equal(logits(following.executor()), before)
    remove(module)
    assert np.array_equal(logits(following.executor()), before)
    assert own_bytes(following.executor()) == {}


def test_several_adapters_of_one_input_fit_beside_it():
    """q, k, v and their A of three adapters are twelve linears of one input, more than one step multiplies."""
    module = randomised("gemma-3-1b")
    following = followed(module)
    for adapter in ("one", "two", "three"):
        enable_lora(module, 2, name=adapter)
        trained(module, adapter)
    agree(following.executor(), module)


def test_a_trained_weight_is_packed_again_alone():
    module = randomised("gemma-2-2b")
    following = followed(module)
    before = logits(following.executor())
    for path in ("layers.0.mlp.up_proj.weight", "norm.weight"):
        with torch.no_grad():
            module.get_parameter(path).mul_(1.5)
        agree(following.executor(), module)
    assert set(own_bytes(following.executor())) == {"layers.0.mlp.up_proj.weight", "norm.weight"}
    with torch.no_grad():
        module.decoder.embed_tokens.weight.mul_(0.5)  # the table, its head, and a sketch of it, if it has one
    agree(following.executor(), module)
    assert "embed_tokens.weight" in own_bytes(following.executor())
    assert not np.array_equal(logits(following.executor()), before)


def test_an_optimizers_step_and_a_merge_are_seen():
    module = randomised("gemma-2b")
    following = followed(module)
    before = logits(following.executor())
    enable_lora(module, 2)
    trained(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(torch.tensor([IDS])).square().mean().backward()
    first = logits(following.executor())
    optimizer.step()
    assert not np.array_equal(logits(following.executor()), first)
    agree(following.executor(), module)
    merge(module)
    agree(following.executor(), module)
    unmerge(module)
    set_strength(module, 0.0)
    assert np.array_equal(logits(following.executor()), before)


def test_what_only_torch_runs_is_left_to_it(tmp_path):
    """The rule of Keras shares one B among heads; a prompt is answered all the same, and the reason is told once."""
    write(tmp_path / "model", "gemma-3-1b")
    model = gemkit.load(tmp_path / "model")
    assert model.executor.name == "native"
    model.enable_lora(2, rule="keras", quiet=True)
    assert model.executor.name == "native"  # packing waits for the next answer
    with pytest.warns(UserWarning, match="torch computes .* from now on"):
        assert model.sync().name == "torch"
    assert model.executor.name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate("Hello", max_tokens=2).ids


def test_a_conversation_goes_on_with_the_changed_model(tmp_path):
    """Nothing of what the old model remembered is left: a turn is what the changed model says to the whole."""
    write(tmp_path / "model", "gemma-3-1b", chat=True)
    model = gemkit.load(tmp_path / "model")
    talk = model.conversation(temperature=0, max_tokens=4)
    talk.say("Hello")
    model.enable_lora(2, quiet=True)
    trained(model.module)
    past = list(talk.ids)
    answer = talk.say("And now?")
    assert model.executor.name == "native"
    prompt = next_turn(model.tokenizer, past, "And now?")
    row = dense(model.executor, [Chunk(0, [*past, *prompt.ids])], model.executor.new_state(1))[0]
    assert int(row.argmax()) == answer.ids[0]


def test_a_pack_over_another_needs_it(tmp_path):
    module = randomised("gemma-2b", depth=1)
    below = pack(module)
    enable_lora(module, 2)
    over = pack(module, tmp_path / "over", over=below)
    assert over.nbytes > sum(own_bytes(NativeExecutor(module.config, over)).values())
    with pytest.raises(WeightsError, match="has no bytes"):
        Pack(tmp_path / "over")
    other = pack(randomised("gemma-7b", depth=1))
    with pytest.raises((WeightsError, ModelError)):
        NativeExecutor(module.config, Pack(tmp_path / "over", other))

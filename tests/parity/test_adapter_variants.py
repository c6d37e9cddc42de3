"""Every kind of adapter that PEFT 0.21 writes and loads: its logits on both executors, and saved back for PEFT."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemkit.adapters import peft_config, registry, saved
from gemkit.errors import ConfigError, WeightsError
from gemkit.executors.interface import Chunk
from gemkit.executors.native import library
from gemkit.executors.native.packer import pack
from gemkit.nn import Batch
from gemkit.runtime.native import executor_of
from gemkit.weights.maps import name_map
from support.native_models import q8_0
from support.outputs import dense
from support.tiny import TOWER, VOCAB, as_trained, assert_close, load, reference, save_reference, tiny, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of what is tied, and of tables that are saved too
]

TOLERANCE = 5e-5  # of the largest logit: adapters lengthen every sum in float32, and PEFT adds in another order
NATIVE = 5e-3  # the native executor keeps keys and values in float16
DEPTH = {"gemma-3-270m": 6}  # of the others 3: a whole pattern of layers
PATCHES = TOWER.tokens
OURS = {"base": "nowhere", "named": "nowhere"}
QV = ["q_proj", "v_proj"]
TOWER_AND_TEXT = r".*\.([qkvo]_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj|linear)"


@dataclass(frozen=True)
class Variant:
    """Settings of PEFT, and what is done to the files after they were saved."""

    member: str = "gemma-2-2b"
    settings: dict = field(default_factory=dict)
    edit: Callable | None = None  # (tensors, config) -> both, changed
    moved: float = 0.01  # share of the largest logit that the adapter moves some logit by, at least


def renamed(change):
    return lambda tensors, config: ({change(name): value for name, value in tensors.items()}, config)


def told(**keys):
    return lambda tensors, config: (tensors, {**config, **keys})


def old_names(name: str) -> str:
    """As Transformers before 4.52 named the modules of PaliGemma."""
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    return re.sub(r"model\.model\.(vision_tower\.)", r"model.\1vision_model.", name)


VARIANTS = {
    **{f"all-linear {m}": Variant(m, {"target_modules": "all-linear"})
       for m in ("gemma-2b", "gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b")},
    "rslora": Variant("gemma-2b", {"use_rslora": True, "r": 4}),
    "ranks by leaf and by path": Variant(settings={"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5}}),
    "ranks and alphas by expression": Variant(
        settings={"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}, "alpha_pattern": {r".*\.1\..*v_proj": 9}}
    ),
    "alphas anchored and by leaf": Variant(
        settings={"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 1.5, "v_proj": 9}}
    ),
    "rslora with both patterns": Variant(
        "gemma-3-270m", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}}
    ),
    "some layers": Variant(settings={"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one expression": Variant(settings={"target_modules": r".*\.[01]\..*(q_proj|up_proj)"}),
    "all but some": Variant(settings={"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    **{f"dora {m}": Variant(m, {"use_dora": True, "target_modules": "all-linear"})
       for m in ("gemma-2b", "gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b")},
    "dora of the table": Variant(settings={"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora of the head": Variant("gemma-3-270m", {"use_dora": True, "target_modules": ["lm_head"]}),
    "dora, rslora, patterns": Variant(settings={"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "dora with dropout": Variant(settings={"use_dora": True, "lora_dropout": 0.3}),
    "biases of changed modules": Variant(
        "recurrentgemma-2b", {"bias": "lora_only", "target_modules": ["linear_x", "o_proj"]}, moved=0.005
    ),
    "all biases": Variant("recurrentgemma-2b", {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
    "dora and biases": Variant(
        "recurrentgemma-2b", {"bias": "lora_only", "use_dora": True, "target_modules": ["linear_y", "o_proj"]}
    ),
    "bias of B": Variant(settings={"lora_bias": True}),
    "norms whole": Variant(settings={"modules_to_save": ["norm"]}),
    "last norm whole": Variant("gemma-3-270m", {"modules_to_save": ["model.norm"]}),
    "table and head whole": Variant(settings={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "table whole": Variant("gemma-2b", {"modules_to_save": ["embed_tokens"]}),
    "head whole": Variant(settings={"modules_to_save": ["lm_head"]}),
    "table and head whole as one": Variant(settings={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "mlp whole": Variant("gemma-2b", {"modules_to_save": ["mlp"]}),
    "recurrence whole": Variant("recurrentgemma-2b", {"modules_to_save": ["rg_lru", "conv_1d", "final_norm"],
                                                      "target_modules": ["q_proj", "linear_x"]}),
    "of the table": Variant(settings={"target_modules": ["embed_tokens"]}),
    "of the head": Variant("gemma-2b", {"target_modules": ["lm_head"]}),
    "tokens": Variant(settings={"trainable_token_indices": [31, 3, 200]}),
    "tokens of the table by name": Variant(
        "gemma-3-270m", {"trainable_token_indices": {"embed_tokens": [31, 3], "lm_head": [31, 3]}}
    ),
    "tokens apart": Variant(settings={"trainable_token_indices": {"embed_tokens": [31, 3], "lm_head": [7]}}),
    "tokens of the head": Variant("gemma-2b", {"trainable_token_indices": {"lm_head": [7, 9]}}, moved=0.005),
    "tokens with scale in bfloat16": Variant(
        "recurrentgemma-2b", {"trainable_token_indices": [31, 3, 200], "target_modules": ["q_proj"]}
    ),
    "tokens and dora": Variant(settings={"trainable_token_indices": [31, 3, 200], "use_dora": True}),
    "table tied": Variant(settings={"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "head tied": Variant("gemma-2b", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "table tied, dora": Variant(
        settings={"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}
    ),
    "pissa": Variant(settings={"init_lora_weights": "pissa"}),
    "pissa and dora": Variant("gemma-2b", {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": Variant("gemma-3-270m", {"init_lora_weights": "olora", "use_rslora": True}),
    "gaussian": Variant(settings={"init_lora_weights": "gaussian"}),
    "orthogonal": Variant(settings={"init_lora_weights": "orthogonal", "r": 4}),
    "mica": Variant(settings={"init_lora_weights": "mica"}),
    "parameters": Variant(settings={"target_modules": [], "target_parameters": ["q_proj.weight", "up_proj.weight"]}),
    "velora": Variant(settings={"velora_config": peft.tuners.lora.VeloraConfig()}),
    "tower, projector and text": Variant("paligemma-3b-pt-224", {"target_modules": "all-linear"}),
    "tower and text": Variant("paligemma-3b-pt-224", {}),
    "text of an image model": Variant("paligemma2-3b-pt-224", {"target_modules": r".*language_model.*\.q_proj"}),
    "dora of tower, projector and text": Variant(
        "paligemma-3b-pt-224", {"target_modules": TOWER_AND_TEXT, "use_dora": True}
    ),
    "all biases of an image model": Variant("paligemma2-3b-pt-224", {"bias": "all"}),
    "biases of changed modules of an image model": Variant(
        "paligemma-3b-pt-224", {"bias": "lora_only", "target_modules": ["fc1", "linear", "q_proj"], "lora_bias": True}
    ),
    "projector whole": Variant(
        "paligemma-3b-pt-224",
        {"target_modules": r".*language_model.*\.q_proj", "modules_to_save": ["multi_modal_projector"]},
    ),
    "tower whole": Variant(
        "paligemma2-3b-pt-224", {"target_modules": r".*language_model.*\.q_proj", "modules_to_save": ["vision_tower"]}
    ),
    "tokens of an image model": Variant(
        "paligemma-3b-pt-224", {"target_modules": r".*language_model.*\.q_proj", "trainable_token_indices": [31, 3]}
    ),
    "old names, text": Variant(
        "paligemma-3b-pt-224", {"target_modules": r".*language_model.*\.q_proj"}, renamed(old_names)
    ),
    "old names, tower too": Variant("paligemma-3b-pt-224", {}, renamed(old_names)),
    "adapter's name left in": Variant(edit=renamed(lambda n: n.replace(".weight", ".default.weight"))),
    "adapter's name left in, everything": Variant(
        settings={"use_dora": True, "modules_to_save": ["model.norm"], "trainable_token_indices": [3, 5]},
        edit=renamed(
            lambda n: n.replace("model.norm.weight", "model.norm.modules_to_save.my.weight")
            .replace("lora_magnitude_vector", "lora_magnitude_vector.my.weight")
            .replace("trainable_tokens_delta", "trainable_tokens_delta.my")
            if "lora_A" not in n and "lora_B" not in n
            else n.replace(".weight", ".my.weight")
        ),
    ),
    "no prefix": Variant(edit=renamed(lambda n: n.removeprefix("base_model.model."))),
    "text with names of the class for images": Variant(
        "gemma-3-270m", {}, renamed(lambda n: n.replace("model.model.layers", "model.model.language_model.layers"))
    ),
    "text with old names of the class for images": Variant(
        "gemma-3-270m", {}, renamed(lambda n: n.replace("model.model.layers", "model.language_model.model.layers"))
    ),
    "_orig_mod in front": Variant(edit=renamed(lambda n: "_orig_mod." + n)),
    "_orig_mod inside": Variant(edit=renamed(lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."))),
    "module in front": Variant(edit=renamed(lambda n: "module." + n)),
    "fsdp inside": Variant(edit=renamed(lambda n: n.replace(".self_attn", "._fsdp_wrapped_module.self_attn"))),
    "dropout null": Variant(edit=told(lora_dropout=None)),
    "rank as a float": Variant(edit=told(r=3.0)),
    "unknown keys that are off": Variant(edit=told(use_newer=False, newer_config=None, more={}, other=[])),
    "fan_in_fan_out": Variant(edit=told(fan_in_fan_out=True)),
    "keys of unsloth": Variant(
        edit=told(auto_mapping={"unsloth_fixed": True}, corda_config=None, qalora_group_size=16)
    ),
}  # fmt: skip


class Bases:
    """Both models of each member, made once."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def __call__(self, name):
        if name not in self.made:
            config = tiny(name)
            config = replace(config, layers=config.layers[: DEPTH.get(name, 3)])
            theirs = reference(config, TOWER if name.startswith("pali") else None)
            self.made[name] = load(save_reference(theirs, self.folder / name)), as_trained(theirs)
        return copy.deepcopy(self.made[name])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


def asked(ours):
    """Ids that hold those with rows of their own; of an image model behind the places of an image."""
    ids = torch.cat([tokens(17)[0] % (VOCAB - 2), torch.tensor([31, 3, 200, 7, 9, 31])])
    if ours.vision is None:
        return ids, None
    ids = torch.cat([torch.full((PATCHES,), TOWER.placeholder), ids])
    size = TOWER.tower.image_size
    return ids, torch.rand(3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def our_logits(ours):
    ids, pixels = asked(ours)
    if pixels is None:
        return ours(Batch.of([ids]))
    return ours(Batch.of([ids], spans=[(0, PATCHES + 4)], image_rows=range(PATCHES)), pixels_ICSS=pixels[None])


def their_logits(theirs, ours):
    ids, pixels = asked(ours)
    if pixels is None:
        return theirs(input_ids=ids[None]).logits[0]
    types = (torch.arange(len(ids)) >= PATCHES + 4).long()[None]
    return theirs(input_ids=ids[None], pixel_values=pixels[None], token_type_ids=types).logits[0]


def native_logits(ours):
    if not library.available()[0]:
        pytest.skip("no native library")
    ids, pixels = asked(ours)
    executor = executor_of(pack(ours), ours.config, ours.vision)
    images = {} if pixels is None else {"images": [pixels.numpy()], "spans": [(0, PATCHES + 4)]}
    return torch.from_numpy(dense(executor, [Chunk(0, ids.tolist(), rows=len(ids), **images)], executor.new_state(1)))


def with_peft(theirs, settings):
    """Their model with an adapter, of which everything that is trained is moved."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": QV, **settings})
    )
    move(wrapped)
    return wrapped.eval()


def move(module, only=lambda name: True):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.requires_grad and only(name):
                spread = weight.std() if weight.numel() > 1 and weight.std() > 0 else 0.3
                weight.add_(0.5 * spread * torch.randn(weight.shape, generator=generator))


def stored(wrapped, folder, edit=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    if edit is not None:
        path = folder / "adapter_model.safetensors"
        tensors, config = edit(load_file(path), json.loads((folder / "adapter_config.json").read_text()))
        save_file(tensors, path)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def opened(theirs, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(theirs, folder, **options).eval()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_both_executors_compute_what_peft_does_and_save_it_back(variant, bases, tmp_path):
    """PEFT's own model is opened anew from its file: that is what others get of it. Edited files are the exception,
    some of which PEFT takes for empty: there the model that saved them is compared with."""
    ours, theirs = bases(variant.member)
    pristine = copy.deepcopy(theirs)
    wrapped = with_peft(theirs, variant.settings)
    folder = stored(wrapped, tmp_path / "adapter", variant.edit)
    with torch.inference_mode():
        plain = our_logits(ours)
        expected = their_logits(opened(copy.deepcopy(pristine), folder) if variant.edit is None else wrapped, ours)
        assert (expected - plain).abs().max() > variant.moved * plain.abs().max()
        saved.attach(ours, folder, "x")
        assert_close(our_logits(ours), expected, TOLERANCE)
        assert_close(native_logits(ours), expected, NATIVE)
        saved.save(ours, tmp_path / "again", **OURS)
        assert_close(their_logits(opened(pristine, tmp_path / "again"), ours), expected, TOLERANCE)
        registry.remove(ours)
        assert torch.equal(our_logits(ours), plain)
        saved.attach(ours, tmp_path / "again", "y")
        assert_close(our_logits(ours), expected, TOLERANCE)


@pytest.mark.parametrize(
    ("member", "settings"),
    [
        ("gemma-2-2b", {"use_dora": True, "trainable_token_indices": [3, 31, 200]}),
        ("gemma-2-2b", {"modules_to_save": ["model.norm", "mlp"], "lora_bias": True}),
        ("gemma-2b", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("recurrentgemma-2b", {"bias": "lora_only", "use_dora": True, "target_modules": ["linear_x", "o_proj"]}),
    ],
    ids=["dora and tokens", "whole and bias of B", "one table", "biases"],
)
def test_they_are_trained_further_with_the_gradients_of_peft(member, settings, bases, tmp_path):
    """2e-4 of the largest of each: a gradient is a longer chain of float32 sums than a logit."""
    ours, theirs = bases(member)
    wrapped = with_peft(theirs, settings)
    saved.attach(ours, stored(wrapped, tmp_path / "adapter"), "x", trainable=True)
    targets = torch.cat([asked(ours)[0][1:], torch.tensor([3])])
    for logits in (our_logits(ours), their_logits(wrapped, ours)):
        torch.nn.functional.cross_entropy(logits, targets).backward()
    theirs_by_end = {}
    for name, weight in wrapped.named_parameters():
        if weight.requires_grad:
            end = re.sub(r"\.(modules_to_save\.)?default|base_layer\.|token_adapter\.", "", name)
            theirs_by_end[end.removeprefix("base_model.model.")] = weight.grad
    table, seen = name_map("safetensors", ours.config, ours.vision), 0
    for name, weight in ours.named_parameters():
        if not weight.requires_grad:
            continue
        module, _, leaf = name.partition(".adapters.x.")
        leaf = leaf.replace("magnitude", "lora_magnitude_vector.weight").replace("rows", "trainable_tokens_delta")
        end = f"{table.module(module)}.{leaf}" if leaf else table.params(name)[0]
        assert_close(weight.grad, theirs_by_end[end], 2e-4)
        seen += 1
    assert seen == len(theirs_by_end)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_strengths_and_several_at_once_on_both_executors(strength, bases, tmp_path):
    """Of one adapter of each kind the strength is changed, and the native executor follows the modules; at 0 nothing is
    left of it."""
    ours, theirs = bases("gemma-2-2b")
    for number, settings in enumerate(
        [{}, {"use_dora": True, "trainable_token_indices": [31, 3]}, {"modules_to_save": ["model.norm"]}]
    ):
        folder = stored(with_peft(copy.deepcopy(theirs), settings), tmp_path / str(number))
        if number == 1:
            without = our_logits(ours).detach()
        saved.attach(ours, folder, f"a{number}")
    with torch.inference_mode():
        whole = our_logits(ours)
        for name in ("a1", "a2"):
            registry.set_strength(ours, strength, name)
        turned = our_logits(ours)
        assert_close(native_logits(ours), turned, NATIVE)
        assert (turned - whole).abs().max() > 0.01 * whole.abs().max()
        if strength == 0:
            assert_close(turned, without, 1e-6)
        for name in ("a1", "a2"):
            registry.set_strength(ours, 1.0, name)
        assert torch.equal(our_logits(ours), whole)


def test_several_apply_one_after_another_as_in_peft(bases, tmp_path):
    ours, theirs = bases("gemma-2-2b")
    both = [{}, {"use_dora": True}]
    folders = [stored(with_peft(copy.deepcopy(theirs), s), tmp_path / str(i)) for i, s in enumerate(both)]
    wrapped = opened(theirs, folders[0], adapter_name="one")
    wrapped.load_adapter(folders[1], "two")
    wrapped.base_model.set_adapter(["one", "two"])
    for folder in folders:
        saved.attach(ours, folder)
    with torch.inference_mode():
        assert_close(our_logits(ours), their_logits(wrapped, ours), TOLERANCE)


def test_both_of_a_weight_or_a_token_are_refused(bases, tmp_path):
    ours, theirs = bases("gemma-2-2b")
    for number, settings in enumerate([{"modules_to_save": ["model.norm"]}, {"trainable_token_indices": [3, 5]}]):
        folder = stored(with_peft(copy.deepcopy(theirs), settings), tmp_path / str(number))
        saved.attach(ours, folder, f"first{number}")
        with pytest.raises(ConfigError, match=r"each (bring a norm\.weight|have rows) of their own"):
            saved.attach(ours, folder, f"second{number}")
        assert f"second{number}" not in registry.names(ours)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoHaConfig(target_modules=QV), "peft_type='LOHA'; only LORA is read here: merge it into the model"),
        (peft.IA3Config(target_modules=QV, feedforward_modules=[]), "peft_type='IA3'"),
        (peft.VeraConfig(target_modules=["q_proj"]), "peft_type='VERA'"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "peft_type='PROMPT_TUNING'"),
    ],
    ids=["loha", "ia3", "vera", "prompts"],
)
def test_other_methods_are_refused_by_name(config, message, bases, tmp_path):
    ours, theirs = bases("gemma-2b")
    stored(peft.get_peft_model(theirs, config), tmp_path / "adapter")
    with pytest.raises(WeightsError, match=message):
        saved.attach(ours, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "drawn anew each time"),
        ({"init_lora_weights": "loftq"}, "quantized in its own way"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"alora_invocation_tokens": [3]}, "changes only the tokens after its invocation"),
        ({"use_qalora": True}, "use_qalora=True is not implemented"),
        ({"a_newer_setting": 0.5}, "a_newer_setting=0.5 is not implemented: a setting of a newer PEFT"),
        ({"use_dora": True}, "no lora_magnitude_vector to go with it"),
    ],
)
def test_settings_that_compute_something_else_are_refused_by_name(keys, message, bases, tmp_path):
    ours, theirs = bases("gemma-2b")
    folder = stored(with_peft(theirs, {}), tmp_path / "adapter", told(**keys))
    with pytest.raises(WeightsError, match=message):
        saved.attach(ours, folder)
    assert registry.names(ours) == []


def test_every_key_of_peft_has_its_place_in_the_table():
    assert {one.name for one in fields(peft.LoraConfig)} - peft_config.ADAPTER.keys() == set()


def test_a_part_of_a_quantized_weight_is_not_taken_out(bases, tmp_path):
    ours, theirs = bases("gemma-2b")
    folder = stored(with_peft(theirs, {"init_lora_weights": "pissa"}), tmp_path / "adapter")
    for i in range(len(ours.layers)):
        weight = ours.layers[i].self_attn.q_proj.weight.detach()
        ours.set_param(f"layers.{i}.self_attn.q_proj.weight", q8_0(weight))
    with pytest.raises(WeightsError, match=r"is quantized .*: load the model dense"):
        saved.attach(ours, folder)

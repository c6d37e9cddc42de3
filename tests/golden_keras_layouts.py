"""Makes data/keras_layouts.json: where Keras puts each weight under the two published layout maps, by its own code.

    python -m venv keras && keras/bin/pip install keras-hub==0.32.0 jax==0.10.2
    keras/bin/python tests/golden_keras_layouts.py

Eight simulated devices. The built-in map is asked of `GemmaBackbone.get_layout_map`; the other is that of the
announcement of Gemma (Keras, February 2024), as it was printed there. Written down for every weight: its path, its
shape, and of each device the (first, end) of every dimension that it holds.
"""

import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import keras
import keras_hub

ANNOUNCEMENT = {
    "token_embedding/embeddings": (None, "model"),
    "decoder_block.*attention.*(query|key|value).*kernel": (None, "model", None),
    "decoder_block.*attention_output.*kernel": (None, None, "model"),
    "decoder_block.*ffw_gating.*kernel": ("model", None),
    "decoder_block.*ffw_linear.*kernel": (None, "model"),
}
SIZES = {"vocabulary_size": 64, "num_layers": 2, "num_query_heads": 8, "hidden_dim": 32, "intermediate_dim": 48}
GEMMA2 = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
MODELS = {  # of ours, and the backbone that Keras has for it
    "gemma-7b": (keras_hub.models.GemmaBackbone, {"num_key_value_heads": 8}),
    "gemma-2-2b": (keras_hub.models.GemmaBackbone, {"num_key_value_heads": 4, **GEMMA2}),
    "gemma-3-4b": (keras_hub.models.Gemma3Backbone, {"num_key_value_heads": 4, "image_size": 16, **GEMMA2}),
    "gemma-2b": (keras_hub.models.GemmaBackbone, {"num_key_value_heads": 1}),
}


def placed(backbone, sizes, map_of, shape):
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), keras.distribution.list_devices())
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=map_of(mesh), batch_dim_name="batch")
    )
    try:
        model = backbone(**SIZES, head_dim=6, **sizes)
    except ValueError as error:
        return {"refused": str(error).splitlines()[0][:200]}
    weights = {}
    for variable in model.variables:
        shards = sorted(variable.value.addressable_shards, key=lambda shard: shard.device.id)
        spans = [[list(s.indices(n)[:2]) for s, n in zip(shard.index, variable.shape)] for shard in shards]  # noqa: B905
        weights[variable.path] = {"shape": list(variable.shape), "devices": spans}
    return weights


def announcement(mesh):
    layout = keras.distribution.LayoutMap(mesh)
    for key, axes in ANNOUNCEMENT.items():
        layout[key] = axes
    return layout


def main():
    maps = {"announcement": announcement, "keras-hub": keras_hub.models.GemmaBackbone.get_layout_map}
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices())
    built_in = {key: list(value.axes) for key, value in maps["keras-hub"](mesh).items()}
    found = {
        "versions": {"keras": keras.__version__, "keras_hub": keras_hub.__version__, "jax": jax.__version__},
        "maps": {"announcement": {k: list(v) for k, v in ANNOUNCEMENT.items()}, "keras-hub": built_in},
        "placed": [
            {"member": name, "map": which, "mesh": list(shape), "weights": placed(*of, map_of, shape)}
            for name, of in MODELS.items()
            for which, map_of in maps.items()
            for shape in ((2, 4), (8, 1))
        ],
    }
    path = Path(__file__).parent / "data" / "keras_layouts.json"
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

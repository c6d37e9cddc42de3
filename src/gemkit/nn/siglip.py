"""The SigLIP image tower (arXiv:2303.15343): pixels to one vector a patch.

    pixels ─ patch_embedding ─(+ position_embedding)─ [ layer_norm1 ─ self_attn ─(+)─ layer_norm2 ─ mlp ─(+) ] x depth ─ post_layernorm ─

    I  images     S  pixels on a side     P  patches of an image     W  width of the tower     T  rows: I * P

The patches of one image after those of another are rows of one ragged batch (`batch.Patches`), each image a sequence
and its attention reaches all of it: every patch sees every patch of its image. The pooling head of SigLIP is no part of it.
"""  # noqa: E501

from __future__ import annotations

from torch.nn import Module, ModuleList, Parameter

from gemkit import family, ops
from gemkit.errors import ConfigError
from gemkit.nn.batch import Patches
from gemkit.nn.layers import LayerNorm, Linear, ParamModule, Recomputable


class PatchEmbedding(ParamModule):
    """A projection of the pixels of each patch; the weight is (W, 3, patch, patch)."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(width, 3, patch_size, patch_size))
        self.bias = Parameter(ops.new_weight(width))

    def forward(self, pixels_ICSS):
        return ops.patch_embed(pixels_ICSS, self.weight, self.bias)

    def extra_repr(self):
        width, channels, patch_size, _ = self.weight.shape
        return f"{channels}, {width}, patch_size={patch_size}"


class PositionEmbedding(ParamModule):
    """Adds a learned vector for each place of a patch."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(patches, width))

    def forward(self, x_TW):
        return ops.add_positions(x_TW, self.weight)

    def extra_repr(self):
        return "{}, {}".format(*self.weight.shape)


class Embeddings(Module):
    """Patch and position embeddings, added."""

    def __init__(self, vision: family.Vision):
        super().__init__()
        self.patch_embedding = PatchEmbedding(vision.width, vision.patch_size)
        self.position_embedding = PositionEmbedding(vision.num_patches, vision.width)

    def forward(self, pixels_ICSS):
        return self.position_embedding(self.patch_embedding(pixels_ICSS))


class EncoderAttention(Module):
    """Attention of all patches of an image to one another, with biases."""

    def __init__(self, vision: family.Vision):
        super().__init__()
        self.head_dim = vision.width // vision.num_heads
        self.scale = self.head_dim**-0.5
        self.q_proj = Linear(vision.width, vision.width, bias=True)
        self.k_proj = Linear(vision.width, vision.width, bias=True)
        self.v_proj = Linear(vision.width, vision.width, bias=True)
        self.out_proj = Linear(vision.width, vision.width, bias=True)

    def forward(self, x_TW, patches: Patches):
        q_TNH = ops.split_heads(self.q_proj(x_TW), self.head_dim)
        k_TNH = ops.split_heads(self.k_proj(x_TW), self.head_dim)
        v_TNH = ops.split_heads(self.v_proj(x_TW), self.head_dim)
        out_TNH = ops.attention(q_TNH, k_TNH, v_TNH, patches, scale=self.scale, window=(None, None))
        return self.out_proj(ops.merge_heads(out_TNH))


class EncoderMLP(Module):
    """The plain feed-forward: `fc2(gelu(fc1(x)))`."""

    def __init__(self, vision: family.Vision):
        super().__init__()
        self.fc1 = Linear(vision.width, vision.mlp_width, bias=True)
        self.fc2 = Linear(vision.mlp_width, vision.width, bias=True)

    def forward(self, x_TW):
        return self.fc2(ops.gelu(self.fc1(x_TW)))


class EncoderLayer(Recomputable):
    """Attention, then a feed-forward, each on the normed residual stream and added to it."""

    def __init__(self, vision: family.Vision):
        super().__init__()
        self.layer_norm1 = LayerNorm(vision.width, vision.norm_eps)
        self.self_attn = EncoderAttention(vision)
        self.layer_norm2 = LayerNorm(vision.width, vision.norm_eps)
        self.mlp = EncoderMLP(vision)

    def compute(self, x_TW, patches: Patches):
        x_TW = ops.add(x_TW, self.self_attn(self.layer_norm1(x_TW), patches))
        return ops.add(x_TW, self.mlp(self.layer_norm2(x_TW)))


class Encoder(Module):
    def __init__(self, vision: family.Vision):
        super().__init__()
        self.layers = ModuleList(EncoderLayer(vision) for _ in range(vision.depth))

    def forward(self, x_TW, patches: Patches):
        for layer in self.layers:
            x_TW = layer(x_TW, patches)
        return x_TW


class Siglip(Module):
    """Pixels to one vector a patch, for any member's `family.Vision`."""

    def __init__(self, vision: family.Vision):
        super().__init__()
        self.vision = vision
        self.embeddings = Embeddings(vision)
        self.encoder = Encoder(vision)
        self.post_layernorm = LayerNorm(vision.width, vision.norm_eps)

    def forward(self, pixels_ICSS):
        """(I * P, W) of pixels (I, 3, S, S) in -1 to 1.

        Raises:
            ConfigError: if they are of another resolution than the tower.
        """
        patches = self.patches(pixels_ICSS)
        return self.post_layernorm(self.encoder(self.embeddings(pixels_ICSS), patches))

    def patches(self, pixels_ICSS) -> Patches:
        """The patches of these images, once their resolution is found to be the tower's."""
        size = self.vision.image_size
        if tuple(pixels_ICSS.shape[1:]) != (3, size, size):
            raise ConfigError(
                f"pixels of shape {tuple(pixels_ICSS.shape)}: this tower sees (images, 3, {size}, {size}); resize to "
                f"{size} x {size}, or load the member of the other resolution"
            )
        return Patches(pixels_ICSS.shape[0], self.vision.num_patches)

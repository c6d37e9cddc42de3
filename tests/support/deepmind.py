"""RecurrentGemma in DeepMind's own PyTorch code (PyPI: recurrentgemma), at the sizes of our tests."""

from __future__ import annotations

import importlib.util
import sys
import types

import torch

from gemkit.family import DecoderConfig, Recurrent

# The package's own __init__ imports JAX. An empty one in its place leads to the same PyTorch files without it.
_found = importlib.util.find_spec("recurrentgemma")
assert _found is not None
assert _found.submodule_search_locations is not None
_package = types.ModuleType("recurrentgemma")
_package.__path__ = list(_found.submodule_search_locations)
sys.modules["recurrentgemma"] = _package

from recurrentgemma import common  # noqa: E402
from recurrentgemma.torch import griffin, layers  # noqa: E402

__all__ = ["Reference", "layers"]


class Reference:
    """Their model with random weights, float32. `norm` is the spread of norms and biases.

    Biases and norms are drawn too, and the recurrence's decays lie between 0.01 and 0.9999: left as they are
    initialised, biases are zeros and could be swapped unseen.
    """

    def __init__(self, decoder: DecoderConfig, seed: int = 0):
        (window,) = decoder.windows
        kinds = common.TemporalBlockType
        self.config = common.GriffinConfig(
            vocab_size=decoder.vocab_size,
            width=decoder.width,
            mlp_expanded_width=decoder.layers[0].ffw.width,
            num_heads=decoder.attention[0].heads,
            block_types=tuple(
                kinds.RECURRENT if isinstance(layer.mixer, Recurrent) else kinds.ATTENTION for layer in decoder.layers
            ),
            embeddings_scale_by_sqrt_dim=True,
            attention_window_size=window - 1,  # theirs does not count the current token
            logits_soft_cap=decoder.final_softcap,
            lru_width=decoder.recurrent[0].width,
        )
        self.model = griffin.Griffin(self.config, gradient_checkpointing=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name.endswith(("scale", ".b", "bias")):
                    weight.normal_(0, 0.3, generator=generator)
                elif name.endswith("a_param"):
                    weight.uniform_(-8, 2, generator=generator)
                else:
                    gain = 1.5 if "proj_q" in name or "proj_k" in name else 1
                    inputs = weight.shape[-2] if name.endswith(".w") else weight.shape[-1]  # theirs are (in, out)
                    weight.normal_(0, gain / inputs**0.5, generator=generator)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of one sequence at once, (T, V)."""
        return self.model(ids[None], torch.arange(len(ids))[None])[0][0]

    def step_by_step(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """The same with a cache: a prompt, then one token at a time."""
        logits, cache = self.model(ids[None, :prompt], torch.arange(prompt)[None])
        rows = [logits[0]]
        for position in range(prompt, len(ids)):
            logits, cache = self.model(ids[None, position : position + 1], torch.tensor([[position]]), cache)
            rows.append(logits[0])
        return torch.cat(rows)

    def left_padded(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """A batch as their sampler makes it: pads in front, at position -1."""
        longest = max(map(len, sequences))
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        positions = torch.full_like(tokens, -1)
        for row, ids in enumerate(sequences):
            tokens[row, longest - len(ids) :] = ids
            positions[row, longest - len(ids) :] = torch.arange(len(ids))
        logits = self.model(tokens, positions)[0]
        return [rows[longest - len(ids) :] for rows, ids in zip(logits, sequences, strict=True)]

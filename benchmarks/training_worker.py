"""A model that is trained, in a process of its own: `python training_worker.py gemkit|peft THREADS`, as worker.py.

Both read the same GGUF, compute in float32, put LoRA of the same rank beside the same projections, and take the same
steps of AdamW on the same token ids. Ours keeps the weights as the file has them, as `gemkit tune` does; Transformers
makes them float32 once and for all. The numbers that A begins with are those of a seed, in an order of names
that both have, and B begins with them too: with zeros there, half of the gradients would be zero.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import peak_memory, resident, serve

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, BETAS, EPS, DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01


class Trained:
    """What both share. A step is the forward pass, the backward pass and AdamW."""

    about: str

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._torch = torch

    def load(self, path: str, rank: int, **settings: Any) -> dict[str, Any]:
        """Open a model and put adapters beside its weights; libraries are in memory before."""
        before = resident()["resident"]
        self._open(Path(path), rank, **settings)
        generator = self._torch.Generator().manual_seed(0)
        with self._torch.no_grad():
            for _, weight in sorted(self._adapters(), key=lambda named: named[0]):
                weight.normal_(0, 0.02, generator=generator)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of loading is not that of a step
        return {"about": self.about, "before": before}

    def step(self, ids: list[int], learned: int) -> dict[str, Any]:
        """One step, with the last `learned` tokens in the loss: their mean loss, and the norm of the gradient."""
        start = time.perf_counter()
        loss, norm = self._step(ids, learned)
        return {"seconds": time.perf_counter() - start, "loss": loss, "norm": norm, "peak": peak_memory()}

    def _open(self, path: Path, rank: int, **settings: Any) -> None:
        raise NotImplementedError

    def _adapters(self) -> list[tuple[str, Any]]:
        """Parameters by a name that both sort alike."""
        raise NotImplementedError

    def _step(self, ids: list[int], learned: int) -> tuple[float, float]:
        raise NotImplementedError


class Ours(Trained):
    """The objective and the optimizer of the trainer, with the settings that it trains in."""

    def __init__(self, threads: int):
        super().__init__(threads)
        import gemkit
        from gemkit.train import loop, objectives  # noqa: F401  # what is imported is not the model's memory

        self.about = f"gemkit {gemkit.__version__}, torch {self._torch.__version__}"

    def _open(self, path: Path, rank: int, **settings: Any) -> None:
        from gemkit.adapters import lora
        from gemkit.train.experiment import Optimizer as Settings
        from gemkit.train.objectives.sft import Sft
        from gemkit.train.optimizer import Optimizer
        from gemkit.weights.checkpoint import find
        from gemkit.weights.load import load_module

        with find(path) as checkpoint:
            self._model, _ = load_module(checkpoint, dtype=self._torch.float32, quantized=True)
            self._objective = Sft(checkpoint.tokenizer)
        lora.enable_lora(self._model, rank, targets=TARGETS)
        trained = dict(self._adapters())
        self._optimizer = Optimizer(
            trained, Settings(RATE, BETAS, EPS, DECAY, grad_clip=0, warmup=0, decay="constant"), steps=1
        )
        self._torch.use_deterministic_algorithms(True)  # as the trainer does
        self._torch.utils.deterministic.fill_uninitialized_memory = False

    def _adapters(self) -> list[tuple[str, Any]]:
        trained = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        return [(name.replace(".adapters.default.", "."), weight) for name, weight in trained]

    def _step(self, ids: list[int], learned: int) -> tuple[float, float]:
        from gemkit.train.batching import Example

        self._model.train()
        weights = np.zeros(len(ids), np.float32)
        weights[-learned:] = 1
        units = [(Example(np.array(ids), weights),)]
        total = self._objective.loss(self._model, units).total / self._objective.size(units)
        total.backward()
        norm = self._optimizer.grad_norm()
        self._optimizer.step(0, norm)
        return float(total), norm


class Peft(Trained):
    """Transformers and PEFT in a plain loop.

    Settings: `attention`, "sdpa" or "eager"; `keep`, whether only logits of learned tokens are asked for.
    """

    def __init__(self, threads: int):
        super().__init__(threads)
        import peft
        import transformers
        from transformers.models.gemma3 import modeling_gemma3  # noqa: F401

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._transformers, self._peft = transformers, peft
        self.about = f"transformers {transformers.__version__}, peft {peft.__version__}"

    def _open(self, path: Path, rank: int, **settings: Any) -> None:
        self._keep = settings["keep"]
        model = self._transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=self._torch.float32, attn_implementation=settings["attention"]
        )
        config = self._peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        self._model = self._peft.get_peft_model(model, config).train()
        self._optimizer = self._torch.optim.AdamW(
            [weight for _, weight in self._adapters()], RATE, BETAS, EPS, weight_decay=DECAY, fused=True
        )

    def _adapters(self) -> list[tuple[str, Any]]:
        trained = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        return [(name.removeprefix("base_model.model.model.").replace(".default.", "."), w) for name, w in trained]

    def _step(self, ids: list[int], learned: int) -> tuple[float, float]:
        torch = self._torch
        given = torch.tensor([ids])
        labels = given.clone()
        labels[:, :-learned] = -100
        rest: dict[str, Any] = {}
        if self._keep:
            rest["logits_to_keep"], labels = learned + 1, labels[:, -learned - 1 :]
        loss = self._model(input_ids=given, labels=labels, use_cache=False, **rest).loss
        loss.backward()
        value = loss.item()
        del loss
        norm = float(torch.nn.utils.get_total_norm([weight.grad for _, weight in self._adapters()]))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return value, norm


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    serve(lambda name, threads: {"gemkit": Ours, "peft": Peft}[name](threads))

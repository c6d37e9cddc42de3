"""The front door: `load` a model, then ask it things in one line each.

>>> model = gemkit.load("gemma-2-2b-it")
>>> print(model.chat("Why is the sky blue?"))
>>> for text in model.stream("Once upon a time"):
...     print(text, end="", flush=True)
>>> for thing in gemkit.load("paligemma-3b-mix-448").detect("street.jpg", "car ; bicycle"):
...     print(thing.label, thing.box)
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from gemkit import generate as loop
from gemkit import text as formats
from gemkit.adapters.resolve import find
from gemkit.conversation import Completer, Conversation, Stream
from gemkit.errors import ConfigError, ModelError
from gemkit.generate import GREEDY, INSTRUCTION_TUNED, MAX_TOKENS, Defaults, Options, Result, Score, unused_ids
from gemkit.image_tasks import ImageTasks, Shown
from gemkit.runtime.open import Runtime, open_runtime
from gemkit.runtime.options import ExecutorName, LoadOptions
from gemkit.text import Tokenizer
from gemkit.weights import hub
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.describe import with_adapter_turns, with_adapters
from gemkit.weights.fit import SCORE
from gemkit.weights.generation import Generation

if TYPE_CHECKING:
    import torch

    from gemkit.adapters.lora import Account, Rule
    from gemkit.nn import LanguageModel
    from gemkit.weights.quantize import Weights


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    executor: ExecutorName = "auto",
    quantized: bool = True,
    weights: Weights | None = None,
    calibrate: bool | str = True,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[int, int], Any] | None = None,
) -> Gemma:
    """A model, ready to run.

    Args:
        name: a member ("gemma-2-2b-it"), a hub id, a folder, a .gguf or .ckpt file; None: the starter model. The folder
            of an adapter opens what it was trained on, with it.
        device: any torch device.
        dtype: "bfloat16" or "float32". None: bfloat16 where the file has it, else float32.
        executor: what computes it: "native" (C++, on a CPU), or "torch" (any device, any dtype). "auto" takes native
            where it is installed and nothing is asked for that only torch has.
        quantized: keep quantized weights as they are in memory. False makes them dense, for torch.
        weights: "int8" or "int4" quantizes them on the way; those that are stored in no more bits stay as they are.
        calibrate: int4 is rounded by what the model computes from a text of ours (True), which takes a while, or from
            this text; False rounds each weight by itself, at once and worse.
        adapter: the folder or hub id of one in PEFT's layout, or several, which all add to what the model computes.
        progress: is called with (bytes read, bytes in all).

    Raises:
        GemkitError: one of its kinds, with what to do about it.
    """
    options = LoadOptions(device, dtype, executor, quantized, weights, calibrate)
    with find(name) as checkpoint:
        model = Gemma(checkpoint, open_runtime(checkpoint, options, progress=progress))
        asked = (adapter,) if isinstance(adapter, str | os.PathLike) else tuple(adapter)
        for folder in (*checkpoint.place.adapters, *asked):
            model.report.notes.append(str(model.load_adapter(folder)))
    model.sync()
    return model


class Gemma(ImageTasks):
    """A loaded model. `load` makes it."""

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.label = checkpoint.label
        self.member = checkpoint.member
        self.config = checkpoint.decoder
        self.vision = checkpoint.vision  # None: it sees no images
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.prompts = checkpoint.prompts  # what it was trained to answer: complete, chat, infill, image
        self.runtime, self.report = runtime, runtime.report
        image_token = None if self.vision is None else self.vision.placeholder
        unused = unused_ids(self.config, len(self.tokenizer), image_token)
        self.completer = Completer(runtime, self.tokenizer, unused, _defaults(checkpoint.generation))
        self._generation = checkpoint.generation
        self.report.notes += [*self.tokenizer.settings.notes, *self._generation.notes]
        self._source, self._display_name = checkpoint.place.name, checkpoint.display_name
        self._scored = SCORE in checkpoint.reader.entries

    def __repr__(self) -> str:
        return f"Gemma({self.label!r})"

    def __str__(self) -> str:
        from gemkit.inspect.tree import tree

        return str(tree(self.config, self.vision))

    @property
    def module(self) -> LanguageModel:
        """The model as torch modules, with its weights. The native executor opens them from the same files when they
        are first read. What is changed in them counts from the next answer on (`sync`)."""
        return self.runtime.module

    @property
    def executor(self) -> Any:
        """The executor as of the last answer or `sync`."""
        return self.runtime.executor

    def sync(self) -> Any:
        """Bring the executor up to date with `module`, and return it.

        Every answer begins with it, so that a changed weight or adapter counts from the next answer on. Call it to use
        `executor` directly after a change, or to pay for packing now. The native executor packs what was changed; a
        model that it cannot run is computed by torch from then on, with a warning.
        """
        return self.runtime.sync()

    def use_torch(self) -> None:
        """Compute with `module` in torch from now on."""
        self.runtime.use_torch()

    # ── changing ────────────────────────────────────────────────────────────────────────────────────────────────────
    #
    # An adapter is a small change beside the weights, and all that is trained (`adapters.lora`). The executor packs it
    # before the next answer (`sync`), so that training or merging to save packs nothing. `runtime.lock`: another thread
    # that asks meanwhile gets the model before the change or after it.

    def enable_lora(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        rule: Rule = "lora",
        dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] = (),
        trainable_tokens: Collection[int] = (),
        name: str = "default",
        seed: int = 0,
        quiet: bool = False,
    ) -> Account:
        """Put new adapters beside the weights, and freeze everything else; `adapters.lora.enable_lora` has the details.

        Says on stderr, unless `quiet`, what was matched and how many parameters are trained.
        """
        from gemkit.adapters import lora

        with self.runtime.lock:
            told = lora.enable_lora(
                self.module,
                rank,
                alpha,
                targets,
                rule=rule,
                dropout=dropout,
                use_dora=use_dora,
                use_rslora=use_rslora,
                modules_to_save=modules_to_save,
                trainable_tokens=trainable_tokens,
                name=name,
                seed=seed,
            )
        if not quiet:
            print(told, file=sys.stderr)
        return told

    def load_adapter(
        self, folder: str | os.PathLike[str], name: str | None = None, *, trainable: bool = False
    ) -> Account:
        """Put an adapter in PEFT's layout beside the weights.

        Args:
            folder: where it is, or its id on the hub.
            name: None takes the folder's.
            trainable: train it further, and freeze everything else.
        """
        from gemkit.adapters import saved

        path = hub.adapter(folder)
        with self.runtime.lock:
            told = saved.attach(self.module, path, name, trainable=trainable)
            self.prompts = with_adapters(self.prompts, [path])
            self.tokenizer = self.completer.tokenizer = with_adapter_turns(self.tokenizer, [path])
        return told

    def save_adapter(
        self, folder: str | os.PathLike[str], name: str | None = None, *, data: Sequence[str] = ()
    ) -> Path:
        """Write an adapter to a new folder that PEFT and Transformers load, with a model card.

        Args:
            name: which, if there are several.
            data: what it was trained on, for the card.
        """
        from gemkit.adapters import saved

        return saved.save(
            self.module,
            folder,
            name,
            base=self._source,
            named=self._display_name,
            prompts=self.prompts,
            templates=formats.templates_of(self.tokenizer),
            data=data,
        )

    def adapters(self) -> list[str]:
        """Names of the adapters that there are, merged ones included."""
        from gemkit.adapters import registry

        return registry.names(self.module)

    def scale_adapter(self, strength: float, name: str | None = None) -> None:
        """Let an adapter count more or less than it was trained to: 1 is as it was, 0 is off."""
        from gemkit.adapters import registry

        with self.runtime.lock:
            registry.set_strength(self.module, strength, name)

    def merge_adapters(self, name: str | None = None) -> list[str]:
        """Add the adapters, or the one of this name, to the weights; their names."""
        from gemkit.adapters import merge

        with self.runtime.lock:
            return merge.merge(self.module, name)

    def unmerge_adapters(self) -> list[str]:
        """Take merged adapters out of the weights again, exactly; their names."""
        from gemkit.adapters import merge

        with self.runtime.lock:
            return merge.unmerge(self.module)

    def remove_adapter(self, name: str | None = None) -> None:
        """Take an adapter away."""
        from gemkit.adapters import registry

        with self.runtime.lock:
            registry.remove(self.module, name)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @overload
    def generate(self, prompt: str, *, control: bool = False, **options: Unpack[Options]) -> Result: ...
    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], *, control: bool = False, **options: Unpack[Options]
    ) -> list[Result]: ...
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, control: bool = False, **options: Unpack[Options]
    ) -> Result | list[Result]:
        """Continue a text, or several in one batch.

        Args:
            control: text that spells a control token, such as `<start_of_turn>`, is that token. By default it is
                text, which is safe with input from strangers.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        asked = [formats.complete(self.tokenizer, p, control=control) for p in prompts]
        results = self.completer.complete(asked, options)
        return results[0] if isinstance(prompt, str) else results

    def stream(self, prompt: str, *, control: bool = False, **options: Unpack[Options]) -> Stream:
        """Continue a text, piece by piece as it comes."""
        return self.completer.stream(formats.complete(self.tokenizer, prompt, control=control), options)

    def chat(self, messages: str | Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Result:
        """The model's next turn of a conversation.

        Args:
            messages: what the user says, or `{"role": "user" | "assistant" | "system", "content": ...}` in turns that
                alternate. A system message is merged into the first user turn: the family has no system role.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        self.warn_if_not_tuned_for_chat()
        return self.completer.complete([formats.chat(self.tokenizer, messages)], options, self.completer.defaults.chat)[
            0
        ]

    def conversation(self, system: str | None = None, **options: Unpack[Options]) -> Conversation:
        """A conversation that remembers: each turn continues from the state that the turns before left."""
        self.warn_if_not_tuned_for_chat()
        return Conversation(self.completer, system, options)

    def load_conversation(self, path: str | os.PathLike[str]) -> Conversation:
        """A conversation that `Conversation.save` wrote, of this model on this executor; nothing is computed again.

        Raises:
            StateError: if it is damaged, or of another architecture or executor.
        """
        return Conversation.load(self.completer, path)

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        path: str | None = None,
        files: Sequence[tuple[str, str]] = (),
        **options: Unpack[Options],
    ) -> Result:
        """Fill-in-the-middle: the text between a prefix and a suffix, by models that were trained for it (CodeGemma).

        Args:
            path: of the file that is being completed.
            files: (path, text) of other files to take into account.
        """
        return self.infill_stream(prefix, suffix, path=path, files=files, **options).finish()

    def infill_stream(
        self,
        prefix: str,
        suffix: str,
        *,
        path: str | None = None,
        files: Sequence[tuple[str, str]] = (),
        **options: Unpack[Options],
    ) -> Stream:
        """`infill`, piece by piece as it comes. `stream.prompt.notes` say what was cut to leave room for the answer."""
        if "infill" not in self.prompts:
            raise ModelError(f"{self.label} was not trained to infill: use codegemma-2b or codegemma-7b")
        answer = options.get("max_tokens") or MAX_TOKENS
        room = self.config.max_context - answer
        if room < 1:
            raise ConfigError(f"max_tokens={answer} leaves no room for a prompt in {self.config.max_context} tokens")
        prompt = formats.infill(self.tokenizer, prefix, suffix, path=path, files=files, max_tokens=room)
        return self.completer.stream(prompt, options)

    def score(
        self,
        text: str,
        *,
        top: int = 0,
        control: bool = False,
        beyond_context: bool = False,
        image: Shown | None = None,
        prompt: str = "",
    ) -> Score:
        """Log-probability of every token of a text, and its perplexity. The text follows a `<bos>`.

        Args:
            top: how many of the most likely tokens to list at each position.
            image, prompt: rate the text as the answer to this prompt on an image, such as "caption en".
        """
        if image is None:
            if prompt:
                raise ConfigError("a prompt belongs to an image; without one, put it in front of the text")
            ids = formats.complete(self.tokenizer, text, control=control).ids
            return loop.score(self.sync(), ids, top=top, beyond_context=beyond_context)
        pictures, task = self._shown(image, prompt)
        ids = [*task.ids, *self.tokenizer.encode(text, control=control)]
        return loop.score(
            self.sync(),
            ids,
            top=top,
            beyond_context=beyond_context,
            spans=[(0, task.prefix)],
            images=self._pixels(pictures),
        )

    def reward(self, answer: str, prompt: str = "") -> float:
        """Reward of an answer to a prompt by a reward model, in the format that it was trained on: turns, if the model
        was tuned for chat and there is a prompt, else text.

        Raises:
            ModelError: if it is no reward model.
        """
        from gemkit.train.data.encoding import encode_answer

        executor = self.sync()
        if not self.is_reward_model:
            raise ModelError(f"{self.label} has no reward head (score.weight): `gemkit tune reward` trains one")
        asked = [{"role": "user", "content": prompt}] if prompt and "chat" in self.prompts else prompt
        return loop.reward(executor, [int(token) for token in encode_answer(self.tokenizer, asked, answer).ids])

    @property
    def is_reward_model(self) -> bool:
        """Whether it has a head of one number, `score`, that `gemkit tune reward` trains."""
        return self._scored if not self.runtime.is_open else self.module.score is not None

    # ── showing, keeping ────────────────────────────────────────────────────────────────────────────────────────────

    def summary(self) -> str:
        """Description of the loaded model: its size, its context, its executor and the reason for it."""
        from gemkit.inspect import cost

        executor = self.sync()
        counts = cost.count(self.config, self.vision)
        dtype = self.report.dtype
        lines = [
            f"{self.label}: {counts.total:,} parameters, {len(self.config.layers)} layers of width {self.config.width}",
            f"weights    {self.report.nbytes / 1e6:,.0f} MB, computed in {dtype} on {executor.device}, "
            f"loaded in {self.report.seconds:.1f} s",
            f"context    {self.config.max_context:,} tokens",
            f"trained to {', '.join(self.prompts)}",
            f"sampling   {self.completer.defaults}",
        ]
        if (template := self.tokenizer.settings.chat_template) is not None:
            lines.append(f"turns      {template.name}")
        if self.vision is not None:
            size = self.vision.tower.image_size
            lines.append(f"images     {size} x {size} pixels, {self.vision.tokens:,} tokens each")
        lines.append(f"executor   {executor.name}: {executor.about()}")
        lines += [f"adapter    {told}" for told in self._accounts()]
        lines += [f"note       {note}" for note in self.report.notes]
        return "\n".join(lines)

    def _accounts(self) -> list[Account]:
        if not self.runtime.is_open:
            return []
        from gemkit.adapters import registry

        return [registry.account(self.module, name) for name in registry.names(self.module)]

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        quantized: bool = False,
        card: str | None = None,
    ) -> Path:
        """Write a folder that Transformers loads unchanged: quantized weights are made dense, exactly. With `quantized`
        they are written as they are, which only gemkit reads.

        Args:
            card: its README.md. None: one that says what was merged, if something was.
        """
        from gemkit.adapters import registry, saved
        from gemkit.weights.export.hf import save_hf

        module = self.module
        inside = registry.merged(module)
        if beside := [name for name in registry.names(module) if name not in inside]:
            raise ConfigError(
                f"{', '.join(beside)} stand beside the weights and would be lost: merge_adapters() first, or "
                "save_adapter() to keep them apart"
            )
        if card is None and inside:
            card = saved.merged_card(module, Path(folder).expanduser().resolve().name, self._display_name)
        return save_hf(
            module,
            folder,
            tokenizer=self.tokenizer,
            prompts=self.prompts,
            generation=self._generation.given,
            dtype=dtype,
            quantized=quantized,
            card=card,
        )

    def warn_if_not_tuned_for_chat(self) -> None:
        """Say once per call site that a pretrained model only continues text."""
        if "chat" not in self.prompts:
            warnings.warn(not_tuned_for_chat(self.label), stacklevel=3)


def _defaults(found: Generation) -> Defaults:
    """Defaults of answers, from what the model's files say."""
    plain = replace(GREEDY, **found.always)
    if found.sampling is None:
        source = f"{found.source}, with gemkit's own sampling" if found.always or found.stop else "gemkit's own"
        return Defaults(plain, replace(INSTRUCTION_TUNED, **found.always), found.stop, source)
    return Defaults(plain, replace(plain, **found.sampling), found.stop, found.source)


def not_tuned_for_chat(label: str) -> str:
    """Warning about chatting with a pretrained model."""
    return (
        f"{label} is a pretrained model: it continues text and was not taught to answer. For conversations load an "
        "instruction-tuned one, such as gemma-3-270m-it, gemma-3-1b-it or gemma-2-2b-it (`gemkit doctor` tells how to "
        "get access)"
    )

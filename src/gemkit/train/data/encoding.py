"""A record to sequences, each token with what its loss counts: the formats are those of `text.prompts`, to the id.

    text        <bos> TEXT <eos>                           a long one in pieces, each with a <bos> of its own
    completion  <bos> prompt COMPLETION <eos>
    chat        <bos> ... <start_of_turn> model \\n ANSWER <end_of_turn> \\n ...       every answer of the conversation
    image       <image>... <bos> task \\n SUFFIX <eos>      all before the suffix sees itself in both directions

What is in capitals is learned, and the token that ends it: it is what the model has to say to stop. The line break
after `<end_of_turn>` is the format's and never asked of a model, so it is read and not learned.

Whatever is learned comes after exactly the ids that a prompt to the model would have, and is what those of an answer
would be: no piece reaches over the border between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, Literal, SupportsIndex

import numpy as np

from gemkit import images
from gemkit.errors import ContextError, TextError
from gemkit.family import Modality
from gemkit.images.read import Source
from gemkit.text import Tokenizer, prompts
from gemkit.text.vocabulary import IMAGE
from gemkit.train.batching import Example

Messages = Sequence[Mapping[str, Any]]


class ControlTokenizer(Tokenizer):
    """A tokenizer to which control tokens that are spelled in text are these tokens: for data that another tool has
    rendered already, as Transformers reads it."""

    spelled_control = True

    def __init__(self, tokenizer: Tokenizer):
        self.__dict__.update(tokenizer.__dict__)

    def encode(self, text: str, *, control: bool = True) -> list[int]:
        return super().encode(text, control=control)

    def bytes(self, id: SupportsIndex, *, control: bool = True) -> bytes:
        return super().bytes(id, control=control)


def encode_text(tokenizer: Tokenizer, text: str, *, context: int | None = None) -> list[Example]:
    """A document; every token of it is learned, and the `<eos>` at its end.

    Args:
        context: a document that is longer is cut into pieces of so many tokens. Each begins with `<bos>`, as everything
            does that a member of the family was trained to see; only the last ends with `<eos>`.

    Raises:
        TextError: if `text` cannot be encoded.
    """
    ids = [*tokenizer.encode(text), tokenizer.eos]
    if isinstance(tokenizer, ControlTokenizer):  # what the text spells itself is not doubled
        ids = ids[ids[0] == tokenizer.bos : -1 if ids[-2:-1] == [tokenizer.eos] else None]
    step = len(ids) if context is None else _room(context, 1)
    return [_learned([tokenizer.bos], ids[start : start + step]) for start in range(0, len(ids), step)]


def prompt_ids(tokenizer: Tokenizer, prompt: str | Messages) -> list[int]:
    """What a model is given to go on from: a text after `<bos>`, messages as turns with the model's turn opened.

    Raises:
        TextError: if it makes no prompt.
    """
    if isinstance(prompt, str):
        return prompts.complete(tokenizer, prompt, control=isinstance(tokenizer, ControlTokenizer)).ids
    return prompts.chat(tokenizer, prompt).ids


def encode_answer(
    tokenizer: Tokenizer, prompt: str | Messages, answer: str, *, context: int | None = None, learn_prompt: bool = False
) -> Example:
    """An answer to a prompt. The answer to messages ends as the model's turns do, with `<end_of_turn>` or what its own
    chat template puts there; that to a text ends with `<eos>`.

    Args:
        context: tokens that the model sees. A sequence that is longer is refused: cut, it would teach not to stop.
        learn_prompt: count the loss of the prompt's tokens too.

    Raises:
        TextError: if prompt or answer cannot be encoded.
        ContextError: if it is too long.
    """
    before = prompt_ids(tokenizer, prompt)
    if isinstance(prompt, str):
        said = tokenizer.encode(answer)
        said += [tokenizer.eos] if said[-1:] != [tokenizer.eos] else []  # it may be spelled, see `ControlTokenizer`
    elif (template := tokenizer.settings.chat_template) is not None:
        spans = template.training(tokenizer, [*prompt, {"role": "assistant", "content": answer}]).spans
        last = max(i for i, (a, b) in enumerate(pairwise(spans)) if b.learned and not a.learned)
        said = [i for span in spans[last + 1 :] if span.learned for i in span.ids]
    else:
        said = [*tokenizer.encode(answer.strip()), tokenizer.id(prompts.END_OF_TURN)]
    _fits(len(before) + len(said), context, "prompt and answer")
    return _learned(before[:1], before[1:] + said) if learn_prompt else _learned(before, said)


def encode_chat(tokenizer: Tokenizer, messages: Messages, *, context: int | None = None) -> Example:
    """A conversation; every answer of the assistant is learned, with the `<end_of_turn>` that ends it, or with what the
    model's own chat template ends it with (`ChatTemplate.training`). It counts what the `weight` of its message says, 1
    where it has none.

    A system message goes before the first user message, as in `prompts.chat`. What the user says last, without an
    answer, is left out, for nothing is to be learned of it.

    Args:
        context: tokens that the model sees. Of a longer conversation the turns at its end are left out, whole, and
            `extra["turns_left_out"]` is their number: an answer cut short would teach not to stop.

    Raises:
        TextError: if the messages make no conversation, or none with an answer.
        ContextError: if `context` does not hold the first answer.
    """
    last = max((i for i, m in enumerate(messages) if prompts.ROLES.get(m.get("role", "")) == "model"), default=-1)
    if last < 0:
        raise TextError("no message is by the assistant, so there is nothing to learn")
    finished = messages[: last + 1]
    template = tokenizer.settings.chat_template
    if template is None:
        spans = prompts.chat(tokenizer, finished, answer=False).spans
    else:
        spans = template.training(tokenizer, finished).spans
    ids = np.fromiter(chain.from_iterable(span.ids for span in spans), np.int64)
    answers = [i for i, message in enumerate(finished) if prompts.ROLES.get(message["role"]) == "model"]
    said, ends = _said(spans, [finished[i].get("weight", 1.0) for i in answers])
    weights = np.repeat(np.array(said, np.float32), [len(span.ids) for span in spans])
    if context is None or len(ids) <= context:
        return Example(ids, weights)
    fitting = [end for end in ends if end <= context]
    if not fitting:
        raise ContextError(
            f"a conversation of {len(ids)} tokens, {ends[0]} to the end of its first answer, and context={context}"
        )
    left_out = last - answers[len(fitting) - 1]
    return Example(ids[: fitting[-1]], weights[: fitting[-1]], extra={"turns_left_out": left_out})


def encode_image(
    tokenizer: Tokenizer,
    pictures: Source | list[Source] | tuple[Source, ...],
    prompt: str,
    suffix: str,
    *,
    vision: Modality,
    context: int | None = None,
    average: Literal["example", "token"] = "example",
) -> Example:
    """A task on pictures and the answer to it, of which the latter is learned, with `<eos>`.

    Pictures are decoded here and made what the image tower takes, as `Gemma` does with those that it is shown.

    Args:
        pictures: one, or several in a list or tuple; paths, or whatever `images.read` takes.
        suffix: the answer, with places as `<loc0000>`; empty where there is nothing to say.
        vision: the image tower, for the size of pictures and the number of their placeholders.
        average: "example": the weights of the suffix make 1, so that long and short answers count the same, as the
            models were trained; "token": each token counts 1.

    Raises:
        ImageError: if a picture cannot be read.
        TextError: if a text cannot be encoded.
        ContextError: if it is longer than `context`.

    Source: prefix-LM loss on the suffix, averaged per example: google-research/big_vision, trainers/proj/paligemma.
    """
    sources = pictures if isinstance(pictures, list | tuple) else [pictures]
    made = prompts.image(tokenizer, prompt, patches=vision.tokens, images=len(sources))
    said = [*tokenizer.encode(suffix), tokenizer.eos]
    _fits(len(made) + len(said), context, "pictures, prompt and suffix")
    return _learned(
        made.ids,
        said,
        weight=1 / len(said) if average == "example" else 1.0,
        prefix=made.prefix,
        images=tuple(
            images.preprocess(images.read(source), vision.tower.image_size, vision.pixels) for source in sources
        ),
        image_token=tokenizer.id(IMAGE),
    )


def _said(spans: Sequence[prompts.Span], weights: Sequence[float]) -> tuple[list[float], list[int]]:
    """What the tokens of each span count, by the weights of the answers; and how many ids there are up to the end of
    each answer, with the white space of the format after it."""
    said, ends, at, answer = [], [], 0, -1
    for i, span in enumerate(spans):
        at += len(span.ids)
        answer += span.learned and (i == 0 or not spans[i - 1].learned)
        said.append(weights[min(answer, len(weights) - 1)] if span.learned else 0.0)
        after = spans[i + 1] if i + 1 < len(spans) else None
        if span.learned and (after is None or not after.learned):
            space = after is not None and after.kind == "template" and after.text.isspace()
            ends.append(at + len(after.ids) if space and after is not None else at)
    if answer + 1 != len(weights):
        raise TextError(f"the chat template has {answer + 1} answers where the conversation has {len(weights)}")
    return said, ends


def _learned(before: Sequence[int], said: Sequence[int], *, weight: float = 1.0, **parts) -> Example:
    """A sequence of which the second part is learned."""
    weights = np.zeros(len(before) + len(said), np.float32)
    weights[len(before) :] = weight
    return Example(np.array([*before, *said], np.int64), weights, **parts)


def _room(context: int, taken: int) -> int:
    if context <= taken:
        raise ContextError(f"context={context} has no room for text: the format alone takes {taken}")
    return context - taken


def _fits(length: int, context: int | None, what: str) -> None:
    if context is not None and length > context:
        raise ContextError(f"{what} are {length} tokens, and context={context}")

"""The image tasks of a model: ask, caption, read text, detect and segment. `gemma.Gemma` inherits them.

An image is a path, bytes, a data URL, an array, a PIL image. A list of images is a batch, with a list of answers; a
tuple of images is one prompt on all of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, overload

from gemkit import detections, images
from gemkit import text as formats
from gemkit.conversation import Completer, Stream
from gemkit.detections import Detections
from gemkit.errors import ConfigError, ModelError
from gemkit.family import Modality
from gemkit.generate import Options, Result
from gemkit.images.read import Picture, Source
from gemkit.text import Prompt, Tokenizer, tasks
from gemkit.text.tasks import CaptionStyle

if TYPE_CHECKING:
    from gemkit.nn.mask_decoder import MaskDecoder

Shown: TypeAlias = "Source | tuple[Source, ...]"  # one prompt's images: one, or several in a tuple


class ImageTasks:
    """Questions about images, for a class that has what is declared here."""

    label: str
    vision: Modality | None
    tokenizer: Tokenizer
    completer: Completer

    @overload
    def ask(self, image: Shown, question: str, *, lang: str | None = "en", **options: Unpack[Options]) -> Result: ...
    @overload
    def ask(
        self, image: list[Shown], question: str | list[str], *, lang: str | None = "en", **options: Unpack[Options]
    ) -> list[Result]: ...
    def ask(self, image: Any, question: Any, *, lang: str | None = "en", **options: Unpack[Options]) -> Any:
        """The answer to a question about an image.

        Args:
            question: for a list of images one for all, or a list of as many.
            lang: code of the language to answer in. None: `question` is the whole prompt, in the words of a task that
                the model was trained on (`text.tasks` lists them), such as "caption de".
        """
        return self._each(image, question, lambda asked: self._question(asked, lang), options)

    def ask_stream(self, image: Shown, question: str, *, lang: str | None = "en", **options: Unpack[Options]) -> Stream:
        """`ask`, piece by piece as it comes."""
        pictures, prompt = self._shown(image, self._question(question, lang))
        return self.completer.stream(prompt, options, images=self._pixels(pictures))

    @overload
    def caption(
        self, image: Shown, lang: str = "en", *, style: CaptionStyle = "caption", **options: Unpack[Options]
    ) -> Result: ...
    @overload
    def caption(
        self, image: list[Shown], lang: str = "en", *, style: CaptionStyle = "caption", **options: Unpack[Options]
    ) -> list[Result]: ...
    def caption(
        self, image: Any, lang: str = "en", *, style: CaptionStyle = "caption", **options: Unpack[Options]
    ) -> Any:
        """A caption.

        Args:
            style: "caption" is short; "cap" and "describe" are longer, and known to the mix models.
        """
        return self._each(image, tasks.caption(lang, style), str, options)

    @overload
    def ocr(self, image: Shown, **options: Unpack[Options]) -> Result: ...
    @overload
    def ocr(self, image: list[Shown], **options: Unpack[Options]) -> list[Result]: ...
    def ocr(self, image: Any, **options: Unpack[Options]) -> Any:
        """The text in an image."""
        return self._each(image, tasks.OCR, str, options)

    @overload
    def detect(self, image: Source, things: str | Sequence[str], **options: Unpack[Options]) -> Detections: ...
    @overload
    def detect(
        self, image: list[Source], things: str | Sequence[str], **options: Unpack[Options]
    ) -> list[Detections]: ...
    def detect(self, image: Any, things: str | Sequence[str], **options: Unpack[Options]) -> Any:
        """Where things are: labelled boxes in pixels of the original image.

        Args:
            things: names, as a list or as the model reads them: "cat ; sleeping dog".
        """
        return self._detections(image, tasks.detect(things), options, None)

    def detect_prompt(
        self, image: Source, task: str, *, masks: MaskDecoder | None = None, **options: Unpack[Options]
    ) -> Detections:
        """The answer to a whole task on an image, such as "detect cat", read as things.

        Args:
            masks: decodes the masks in the answer (`detections.find_masks`); None: things have boxes alone.
        """
        return self._detections(image, task, options, masks)

    @overload
    def segment(
        self,
        image: Source,
        things: str | Sequence[str],
        *,
        masks: str | os.PathLike[str] | None = None,
        **options: Unpack[Options],
    ) -> Detections: ...
    @overload
    def segment(
        self,
        image: list[Source],
        things: str | Sequence[str],
        *,
        masks: str | os.PathLike[str] | None = None,
        **options: Unpack[Options],
    ) -> list[Detections]: ...
    def segment(
        self,
        image: Any,
        things: str | Sequence[str],
        *,
        masks: str | os.PathLike[str] | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Boxes and masks of things, in pixels of the original image.

        Masks need the published decoder of their codes. Without it the boxes come, and a warning says where it is to
        be had.

        Args:
            masks: its file, `vae-oid.npz`. None: the one that the environment variable GEMKIT_MASKS names.
        """
        decoder = detections.find_masks(masks)
        if decoder is None:
            warnings.warn(detections.NO_MASKS, stacklevel=2)
        return self._detections(image, tasks.segment(things), options, decoder)

    def _question(self, question: str, lang: str | None) -> str:
        return question if lang is None else tasks.answer(question, lang)

    def _each(self, image: Any, texts: Any, word: Callable[[str], str], options: Options) -> Any:
        """One answer, or a list of them for a list of images."""
        several = isinstance(texts, list | tuple)
        if not isinstance(image, list):
            if several:
                raise ConfigError(f"{len(texts)} questions about one image: give a list of as many images, a batch")
            return self._answers([image], [word(texts)], options)[0][1]
        texts = texts if several else [texts] * len(image)
        if len(texts) != len(image):
            raise ConfigError(f"{len(image)} images and {len(texts)} questions: one for all, or one for each")
        return [result for _, result in self._answers(image, list(map(word, texts)), options)]

    def _detections(self, image: Any, text: str, options: Options, decoder: MaskDecoder | None) -> Any:
        batch = image if isinstance(image, list) else [image]
        if any(isinstance(one, tuple) for one in batch):
            raise ConfigError("places are those of one image: give a list of images, not a tuple, to look in several")
        answers = self._answers(batch, [text] * len(batch), options)
        found = [detections.read(pictures[0], result, decoder) for pictures, result in answers]
        return found if isinstance(image, list) else found[0]

    def _answers(
        self, shown: Sequence[Shown], texts: Sequence[str], options: Options
    ) -> list[tuple[list[Picture], Result]]:
        """All answers as one batch, each with the pictures that it is about."""
        pairs = [self._shown(image, text) for image, text in zip(shown, texts, strict=True)]
        pixels = [self._pixels(pictures) for pictures, _ in pairs]
        results = self.completer.complete([prompt for _, prompt in pairs], options, images=pixels)
        return [(pictures, result) for (pictures, _), result in zip(pairs, results, strict=True)]

    def _shown(self, image: Shown, text: str) -> tuple[list[Picture], Prompt]:
        """The pictures of one prompt, and the prompt."""
        if self.vision is None:
            raise no_image_tower(self.label)
        pictures = [images.read(source) for source in (image if isinstance(image, tuple) else (image,))]
        if not pictures:
            raise ConfigError("a prompt on no image: give one, or several in a tuple")
        return pictures, formats.image(self.tokenizer, text, patches=self.vision.tokens, images=len(pictures))

    def _pixels(self, pictures: Sequence[Picture]) -> list[Any]:
        assert self.vision is not None
        return [images.preprocess(picture, self.vision.tower.image_size, self.vision.pixels) for picture in pictures]


def no_image_tower(label: str) -> ModelError:
    """Error for a model without an image tower; it names members that have one."""
    return ModelError(
        f"{label} has no image tower and cannot see an image: use a PaliGemma, such as paligemma-3b-mix-224 or "
        "paligemma2-3b-mix-448"
    )

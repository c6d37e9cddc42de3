"""Parts of the verbs that look at pictures: which model can, reading before loading, printing detections."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import add_model, add_output, add_sampling, load_model, options
from gemkit.cli.output import conclude, print_json, printable, result_json, say
from gemkit.errors import ConfigError

if TYPE_CHECKING:
    from gemkit.gemma import Gemma
    from gemkit.generate import Options
    from gemkit.images import Picture
    from gemkit.nn.mask_decoder import MaskDecoder


def read_all(paths: Sequence[str]) -> list[Picture]:
    """The pictures, before anyone waits for a model. Raises ImageError for the first that is none."""
    from gemkit import images

    return [images.read(path) for path in paths]


def load_image_model(args: argparse.Namespace) -> Gemma:
    """The model that -m names.

    Raises:
        ModelError: if it sees no images; of a member that is told without loading it.
    """
    from gemkit.image_tasks import no_image_tower
    from gemkit.weights import hub

    if args.model is None:
        raise no_image_tower("the starter model")
    _, member = hub.locate(args.model)
    if member is not None and member.vision is None:
        raise no_image_tower(member.name)
    model = load_model(args)
    if model.vision is None:
        raise no_image_tower(model.label)
    return model


def add_image(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a picture: a file or a data URL", **options)


def add_find(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that find things in a picture."""
    add_image(parser)
    parser.add_argument("things", help="what to look for; several between semicolons")
    parser.add_argument("--overlay", metavar="PNG", help="write the picture with what was found drawn over it")
    add_sampling(parser)
    add_model(parser, images=True)
    add_output(parser)


def find(args: argparse.Namespace, task: str, decoder: MaskDecoder | None = None) -> int:
    """Look for things in a picture, print and draw what was found; the exit code."""
    (picture,) = read_all([args.image])
    if args.overlay is not None:
        _check_overlay(Path(args.overlay), args.image)
    chosen: Options = options(args)
    model = load_image_model(args)
    detections = model.detect_prompt(picture, task, masks=decoder, **chosen)
    if args.json:
        found = {"width": picture.width, "height": picture.height, "things": detections.coco(), "rest": detections.rest}
        print_json(
            {
                "model": model.label,
                "image": args.image,
                "prompt": task,
                **found,
                **result_json(detections.result, model.tokenizer),
            }
        )
    else:
        for line in filter(None, str(detections).splitlines()):
            print(printable(line, args.raw))
    if not len(detections):
        say("nothing was found")
    if args.overlay is not None:
        detections.save_overlay(args.overlay)
        say(f"drawn into {args.overlay}")
    return conclude(args, model.tokenizer, detections.result)


def _check_overlay(target: Path, image: str) -> None:
    """Raises ConfigError for what cannot be written, before anyone waits for a model, and for the picture itself."""
    if not Path(os.path.abspath(target)).parent.is_dir():
        raise ConfigError(f"--overlay {target}: there is no such folder")
    if target.is_dir():
        raise ConfigError(f"--overlay {target} is a folder: name a file to write")
    if target.exists() and os.path.exists(image) and os.path.samefile(target, image):
        raise ConfigError(f"--overlay {target} is the picture itself, which would be lost: name another file")

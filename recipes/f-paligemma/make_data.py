"""Pictures of coloured shapes and what to answer about them, a vocabulary, and a new tiny PaliGemma.

    python recipes/f-paligemma/make_data.py --out data/shapes

    train.jsonl, held-out.jsonl   {"image": "train/000017.png", "prompt": "detect red circle", "answer": "<loc0310>..."}
    train/, held-out/             the pictures, 112 x 112
    start/                        the model to train, with random weights
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

from common import TOKENIZERS, new_model, write_jsonl
from gemkit.family import Decoder, Global, Vision
from gemkit.nn import PaliGemma
from gemkit.text import Box, Place, Tokenizer, places, tasks
from gemkit.text.vocabulary import IMAGE
from gemkit.weights.save import save_hf

SIDE = 112  # pixels
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 40)}
SHAPES = ("circle", "square", "triangle")
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
HELD_OUT, HELD_OUT_ABSENT = 200, 50


@dataclass(frozen=True)
class Shape:
    """A thing in a picture; centre and half side in pixels, neither whole numbers."""

    thing: str
    x: float
    y: float
    half: float

    @property
    def place(self) -> Place:
        """Its box, as a model says it."""
        edges = (self.x - self.half, self.y - self.half, self.x + self.half, self.y + self.half)
        return Place(self.thing, Box.from_pixels(*edges, SIDE, SIDE))

    def covers(self, x_X: np.ndarray, y_Y1: np.ndarray) -> np.ndarray:
        """How much of each pixel it covers, (Y, X) in 0 to 1: by the distance of the pixel's centre from the edge."""
        across_X, down_Y1 = x_X - self.x, y_Y1 - self.y
        match self.thing.split()[1]:
            case "circle":
                outside = np.hypot(across_X, down_Y1) - self.half
            case "square":
                outside = np.maximum(np.abs(across_X), np.abs(down_Y1)) - self.half
            case _:  # a triangle on its base: the two sides rise by two for each one across
                outside = np.maximum(down_Y1 - self.half, (2 * np.abs(across_X) - down_Y1 - self.half) / 5**0.5)
        return np.clip(0.5 - outside, 0, 1)


def scene(rng: np.random.Generator) -> list[Shape]:
    """Two to four different things that do not touch."""
    wanted = int(rng.integers(2, 5))
    names = rng.permutation(THINGS)
    shapes: list[Shape] = []
    while len(shapes) < wanted:
        half = rng.uniform(9, 22)
        x, y = rng.uniform(half + 1, SIDE - half - 1, size=2)
        if all(max(abs(x - other.x), abs(y - other.y)) > half + other.half + 1 for other in shapes):
            shapes.append(Shape(str(names[len(shapes)]), x, y, half))
    return shapes


def draw(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (Y, X, 3): shapes of uneven colour on an uneven grey."""
    centres = np.arange(SIDE) + 0.5
    picture = np.full((SIDE, SIDE, 3), rng.uniform(150, 235)) + rng.normal(0, 4, (SIDE, SIDE, 1))
    for shape in shapes:
        covered = shape.covers(centres, centres[:, None])[..., None]
        colour = np.array(COLOURS[shape.thing.split()[0]]) + rng.normal(0, 12, 3)
        picture += covered * (colour - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def answer(shapes: list[Shape], things: list[str]) -> str:
    """What to say of these things, in the order in which they were asked for; nothing of those that are not there."""
    found = {shape.thing: shape.place for shape in shapes}
    return places.write([found[thing] for thing in things if thing in found])


def question(shapes: list[Shape], rng: np.random.Generator) -> list[str]:
    """What to ask about a picture: everything in it, or one thing, which in a third of those cases is not there."""
    there = [shape.thing for shape in shapes]
    if rng.random() < 0.5:
        return [str(thing) for thing in rng.permutation(there)]
    absent = [thing for thing in THINGS if thing not in there]
    return [str(rng.choice(absent if rng.random() < 1 / 3 else there))]


def examples(seed: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Picture, prompt and answer, without end."""
    rng = np.random.default_rng(seed)
    while True:
        shapes = scene(rng)
        things = question(shapes, rng)
        yield draw(shapes, rng), tasks.detect(things), answer(shapes, things)


def held_out(seed: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """The pictures to measure with: one thing is asked of each, and of the last 50 one that is not there."""
    rng = np.random.default_rng(seed)
    for i in range(HELD_OUT):
        shapes = scene(rng)
        there = [shape.thing for shape in shapes]
        absent = [thing for thing in THINGS if thing not in there]
        thing = str(rng.choice(there if i < HELD_OUT - HELD_OUT_ABSENT else absent))
        yield draw(shapes, rng), tasks.detect(thing), answer(shapes, [thing])


def tokenizer() -> Tokenizer:
    return Tokenizer.from_model(TOKENIZERS / "shapes.model").with_places()


def model(vocabulary: Tokenizer, seed: int = 0) -> PaliGemma:
    """A tower and a decoder of four layers each. The rows of the places begin on a smooth curve, so that neighbours
    begin alike and what is learned of one is learned of those around it."""
    vision = Vision(SIDE, patch_size=14, width=96, depth=4, num_heads=4, mlp_width=256, image_token=vocabulary.id(IMAGE))
    config = Decoder(
        vocab_size=len(vocabulary),
        width=96,
        ffw_width=256,
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        layers=(Global(),) * 4,
        max_context=256,
        query_scale=32**-0.5,
    )
    module = new_model(config, vision, seed=seed)
    assert isinstance(module, PaliGemma)
    first = vocabulary.id("<loc0000>")
    with torch.no_grad():
        table = module.embed_tokens.weight
        where = torch.arange(1024)[:, None] / 1023
        generator = torch.Generator().manual_seed(seed + 1)
        rate = torch.empty(config.width).exponential_(1 / 12, generator=generator)  # most turn slowly, some fast
        phase = torch.empty(config.width).uniform_(0, 2 * torch.pi, generator=generator)
        table[first : first + 1024] = (2 / config.width) ** 0.5 * torch.cos(where * rate + phase)
    return module


def _write(folder: Path, name: str, chosen: Iterator[tuple[np.ndarray, str, str]]) -> int:
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for i, (picture, prompt, said) in enumerate(chosen):
        image = f"{name}/{i:06}.png"
        Image.fromarray(picture).save(folder / image)
        records.append({"image": image, "prompt": prompt, "answer": said})
    return write_jsonl(folder / f"{name}.jsonl", records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"))
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    endless = examples(options.seed)
    trained = _write(options.out, "train", (next(endless) for _ in range(options.examples)))
    measured = _write(options.out, "held-out", held_out(options.seed + 1_000_003))
    vocabulary = tokenizer()
    save_hf(model(vocabulary), options.out / "start", tokenizer=vocabulary, prompts=("image",))
    print(f"{trained} pictures to train on, {measured} to measure with, and a new model in {options.out}")


if __name__ == "__main__":
    main()

"""Pictures of coloured shapes and what to answer about them, a vocabulary, and a new tiny PaliGemma.

python recipes/f-paligemma/make_data.py --out data/shapes

train.jsonl, held-out.jsonl   {"image": "train/000017.png", "prompt": "detect red circle", "suffix": "<loc0310>..."}
train/, held-out/             the pictures, 112 x 112
start/                        the model to train, with random weights
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

from common import TOKENIZERS, write_jsonl

from gemkit.family import DecoderConfig, Global, Mlp, Modality, Vision, repeat
from gemkit.nn import Multimodal
from gemkit.text import Box, Place, Tokenizer, places, tasks
from gemkit.text.vocabulary import IMAGE
from gemkit.train.initialise import new_module
from gemkit.weights.export.hf import save_hf

SIDE = 112  # pixels
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 40)}
SHAPES = ("circle", "square", "triangle")
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
HELD_OUT, HELD_OUT_ABSENT = 200, 50
HELD_OUT_SEED = 1_000_003
QUESTIONS = 3  # of each picture to train on
# Edges that are learned lie on every eighth of the 1,024 places, 7/8 of a pixel apart. An edge is known to a pixel or
# two; over all places that is a chance of a few percent for each, and the end of the answer, at 15 %, comes first.
GRID = 128


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


def scene(rng: np.random.Generator, alone: float = 0.0) -> list[Shape]:
    """Two to four different things that do not touch, or one, in so large a share of the pictures."""
    wanted = 1 if rng.random() < alone else int(rng.integers(2, 5))
    names = rng.permutation(THINGS)
    shapes: list[Shape] = []
    while len(shapes) < wanted:
        half = rng.uniform(9, 22)
        x, y = rng.uniform(half + 1, SIDE - half - 1, size=2)
        if all(max(abs(x - other.x), abs(y - other.y)) > half + other.half + 1 for other in shapes):
            shapes.append(Shape(str(names[len(shapes)]), x, y, half))
    return shapes


def draw(shapes: list[Shape], rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (Y, X, 3): shapes on grey, each in a shade of its colour."""
    centres = np.arange(SIDE) + 0.5
    picture = np.full((SIDE, SIDE, 3), rng.uniform(120, 136))
    for shape in shapes:
        colour = np.array(COLOURS[shape.thing.split()[0]]) + rng.normal(0, 12, 3)
        x, y = (slice(max(int(c - shape.half) - 1, 0), int(c + shape.half) + 2) for c in (shape.x, shape.y))
        picture[y, x] += shape.covers(centres[x], centres[y, None])[..., None] * (colour - picture[y, x])
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def answer(shapes: list[Shape], things: list[str], grid: int = 1024) -> str:
    """What to say of these things, in the order in which they were asked for; nothing of those that are not there.

    Args:
        grid: in how many steps a side of the picture is told.
    """
    found = {shape.thing: Place(shape.thing, _rounded(shape.place.box, grid)) for shape in shapes}
    return places.write([found[thing] for thing in things if thing in found])


def _rounded(box: Box, grid: int) -> Box:
    return Box(*(round(edge * grid) / grid for edge in (box.y_min, box.x_min, box.y_max, box.x_max)))


def question(shapes: list[Shape], rng: np.random.Generator) -> tuple[str, str]:
    """What to ask about a picture, and the answer.

    Mostly for one thing, which may not be there: half of the time where one shape is alone, for that is the shortest
    way to learn that the words and the picture have to agree; and then mostly in a colour that is there, for shapes are
    harder than colours. Sometimes what there is, from top to bottom, which teaches the names: without such questions
    only places are learned, for most of the loss is theirs. Sometimes all that are there, in some order: more is
    learned of a picture then.
    """
    there = [shape.thing for shape in shapes]
    kind = rng.random()
    if kind < 0.15:
        downwards = sorted(shapes, key=lambda shape: shape.y - shape.half)
        return tasks.caption(), " ; ".join(shape.thing for shape in downwards)
    if kind < 0.25 and len(shapes) > 1:
        things = [str(thing) for thing in rng.permutation(there)]
    else:
        absent = [thing for thing in THINGS if thing not in there]
        if rng.random() < 0.6:
            colours = {thing.split()[0] for thing in there}
            absent = [thing for thing in absent if thing.split()[0] in colours] or absent
        things = [str(rng.choice(absent if rng.random() < (0.5 if len(shapes) == 1 else 0.25) else there))]
    return tasks.detect(things), answer(shapes, things, GRID)


def examples(seed: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    """Pictures, each with some prompts and answers, without end."""
    rng = np.random.default_rng(seed)
    while True:
        shapes = scene(rng, alone=0.3)  # places can then be learned before it is known what things are called
        asked = [question(shapes, rng) for _ in range(QUESTIONS)]
        yield draw(shapes, rng), asked


def held_out(seed: int) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    """The pictures to measure with: one thing is asked of each, and of the last 50 one that is not there."""
    rng = np.random.default_rng(seed)
    for i in range(HELD_OUT):
        shapes = scene(rng)
        there = [shape.thing for shape in shapes]
        absent = [thing for thing in THINGS if thing not in there]
        thing = str(rng.choice(there if i < HELD_OUT - HELD_OUT_ABSENT else absent))
        yield draw(shapes, rng), [(tasks.detect(thing), answer(shapes, [thing]))]


def tokenizer() -> Tokenizer:
    return Tokenizer.from_model(TOKENIZERS / "shapes.model").with_places()


def model(vocabulary: Tokenizer, seed: int = 0) -> Multimodal:
    """A tower and a decoder of three layers each.

    Where patches are, and the rows of the places that are answered, begin on smooth curves: neighbours begin alike, and
    what is learned of one is learned of those around it. What patches show begins as the lowest frequencies of each
    colour, and stays so (`freeze` in the experiment): the pixels of a patch are so much alike that any step of Adam,
    which changes all of a row by as much, would change what is seen by a multiple of that. All else begins as new
    models do.
    """
    tower = Vision(SIDE, patch_size=16, width=96, depth=3, num_heads=4, mlp_width=288)
    vision = Modality(tower, placeholder=vocabulary.id(IMAGE))
    config = DecoderConfig(
        vocab_size=len(vocabulary),
        width=96,
        layers=repeat(Global(heads=4, kv_heads=4, head_dim=24, scale=24**-0.5), ffw=Mlp(288), total=3),
        max_context=256,
    )
    module = new_module(config, vision, seed=seed)
    assert isinstance(module, Multimodal)
    side = SIDE // tower.patch_size
    centres = (torch.arange(side) + 0.5) / side
    down_P, across_P = (where_PP.flatten() for where_PP in torch.meshgrid(centres, centres, indexing="ij"))
    first = vocabulary.id("<loc0000>")
    embeddings = module.vision_tower.embeddings
    with torch.no_grad():
        where = [_curve(at_P, tower.width // 2, 3.0 * side) for at_P in (down_P, across_P)]
        embeddings.position_embedding.weight.copy_(0.5 * torch.cat(where, 1))
        embeddings.patch_embedding.weight.copy_(4 * _waves(tower.width // 3, tower.patch_size))
        rows = module.decoder.embed_tokens.weight[first : first + 1024]
        rows.copy_(config.width**-0.5 * _curve(torch.arange(1024) / 1024, config.width, 100.0))
    return module


def _curve(at_P: torch.Tensor, width: int, fastest: float) -> torch.Tensor:
    """(P, width), of mean square 1: cosines and sines of where each point is, of 1 to `fastest` radians."""
    angles = at_P[:, None] * torch.logspace(0, math.log10(fastest), width // 2)
    return 2**0.5 * torch.cat([torch.cos(angles), torch.sin(angles)], 1)


def _waves(count: int, size: int) -> torch.Tensor:
    """(3 * count, 3, size, size): the lowest waves of two dimensions, each of each colour.

    A faster one counts more, for edges have less of it.
    """
    at_Y = (torch.arange(size) + 0.5) / size
    lowest = sorted((i * i + j * j, i, j) for i in range(size) for j in range(size))[:count]
    filters = torch.zeros(3, count, 3, size, size)
    for n, (square, i, j) in enumerate(lowest):
        down_Y, across_Y = (torch.cos(torch.pi * k * at_Y) * (2**0.5 if k else 1) / size for k in (i, j))
        for colour in range(3):
            filters[colour, n, colour] = (1 + square) ** 0.5 * torch.outer(down_Y, across_Y)
    return filters.flatten(0, 1)


def write(folder: Path, name: str, chosen: Iterator[tuple[np.ndarray, list[tuple[str, str]]]]) -> int:
    """Pictures into a folder of that name, and a record of each question; how many questions."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for i, (picture, asked) in enumerate(chosen):
        image = f"{name}/{i:06}.png"
        Image.fromarray(picture).save(folder / image, compress_level=1)
        records += [{"image": image, "prompt": prompt, "suffix": said} for prompt, said in asked]
    return write_jsonl(folder / f"{name}.jsonl", records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"))
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    endless = examples(options.seed)
    trained = write(options.out, "train", (next(endless) for _ in range(options.pictures)))
    measured = write(options.out, "held-out", held_out(HELD_OUT_SEED))
    vocabulary = tokenizer()
    save_hf(model(vocabulary), options.out / "start", tokenizer=vocabulary, prompts=("image",))
    print(f"{trained} questions to train on, {measured} to measure with, and a new model in {options.out}")


if __name__ == "__main__":
    main()

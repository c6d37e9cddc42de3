"""Pictures of coloured shapes and what to answer about them, a vocabulary, and a new tiny PaliGemma.

python recipes/f-paligemma/make_data.py --out data/shapes

train.jsonl, held-out.jsonl   {"image": "train/000017.png", "prompt": "detect red circle", "suffix": "<loc0310>..."}
train/, held-out/             the pictures, 112 x 112
start/                        the model to train, with random weights
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

from common import TOKENIZERS, write_jsonl

from gemkit.family import Decoder, Global, Vision
from gemkit.nn import PaliGemma
from gemkit.text import Box, Place, Tokenizer, places, tasks
from gemkit.text.vocabulary import IMAGE
from gemkit.train.initialise import new_module
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
        covered = shape.covers(centres, centres[:, None])[..., None]
        colour = np.array(COLOURS[shape.thing.split()[0]]) + rng.normal(0, 12, 3)
        picture += covered * (colour - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def answer(shapes: list[Shape], things: list[str]) -> str:
    """What to say of these things, in the order in which they were asked for; nothing of those that are not there."""
    found = {shape.thing: shape.place for shape in shapes}
    return places.write([found[thing] for thing in things if thing in found])


def question(shapes: list[Shape], rng: np.random.Generator) -> list[str]:
    """What to ask about a picture: one thing, which in a quarter of the cases is not there; seldom all of them."""
    there = [shape.thing for shape in shapes]
    if rng.random() < 0.05:
        return [str(thing) for thing in rng.permutation(there)]
    absent = [thing for thing in THINGS if thing not in there]
    return [str(rng.choice(absent if rng.random() < 0.25 else there))]


def examples(seed: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Picture, prompt and answer, without end."""
    rng = np.random.default_rng(seed)
    while True:
        shapes = scene(rng, alone=0.3)  # places can then be learned before it is known what things are called
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
    """A tower and a decoder of three layers each.

    Where patches are, and the rows of the places that are answered, begin on smooth curves: neighbours begin alike, and
    what is learned of one is learned of those around it. All else begins as new models do.
    """
    tower = Vision(SIDE, patch_size=14, width=96, depth=3, num_heads=3, mlp_width=288)
    vision = replace(tower, image_token=vocabulary.id(IMAGE))
    config = Decoder(
        vocab_size=len(vocabulary),
        width=96,
        ffw_width=288,
        num_heads=3,
        num_kv_heads=1,
        head_dim=32,
        layers=(Global(),) * 3,
        max_context=256,
        query_scale=32**-0.5,
    )
    module = new_module(config, vision, seed=seed)
    assert isinstance(module, PaliGemma)
    generator = torch.Generator().manual_seed(seed + 1)
    grid = torch.linspace(0, 1, SIDE // tower.patch_size)
    down_PP, across_PP = torch.meshgrid(grid, grid, indexing="ij")
    where_P2 = torch.stack([down_PP.flatten(), across_PP.flatten()], 1)
    first = vocabulary.id("<loc0000>")
    with torch.no_grad():
        patches = module.vision_tower.embeddings.position_embedding.weight
        patches.copy_(0.5 * _curve(where_P2, tower.width, 6.0, generator))
        rows = module.embed_tokens.weight[first : first + 1024]
        rows.copy_(config.width**-0.5 * _curve(torch.linspace(0, 1, 1024)[:, None], config.width, 20.0, generator))
    return module


def _curve(where_PX: torch.Tensor, width: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """(P, width), of mean square 1: cosines of where each point is, most of them slower than `rate`, some faster."""
    rates_XW = torch.empty(where_PX.shape[1], width).exponential_(1 / rate, generator=generator)
    rates_XW *= torch.randint(0, 2, rates_XW.shape, generator=generator) * 2 - 1
    phases_W = torch.empty(width).uniform_(0, 2 * torch.pi, generator=generator)
    return 2**0.5 * torch.cos(where_PX @ rates_XW + phases_W)


def _write(folder: Path, name: str, chosen: Iterator[tuple[np.ndarray, str, str]]) -> int:
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for i, (picture, prompt, said) in enumerate(chosen):
        image = f"{name}/{i:06}.png"
        Image.fromarray(picture).save(folder / image, compress_level=1)
        records.append({"image": image, "prompt": prompt, "suffix": said})
    return write_jsonl(folder / f"{name}.jsonl", records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"))
    parser.add_argument("--examples", type=int, default=48_000)
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

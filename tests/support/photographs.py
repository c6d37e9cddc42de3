"""Photographs for tests, from the wheel of scikit-image: nothing is downloaded, and skimage itself is not imported."""

from importlib.util import find_spec
from pathlib import Path

_spec = find_spec("skimage")
assert _spec is not None
assert _spec.origin is not None
FOLDER = Path(_spec.origin).parent / "data"

# colour, grey, bilevel, transparent and palette; shrunk at 224 and 448, and some of them enlarged; square and not
NAMES = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "logo.png",
    "microaneurysms.png",
    "moon.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
]

"""Meshes as they are written, and the places of their devices against NumPy's own order."""

import numpy as np
import pytest

from gemkit.errors import ConfigError
from gemkit.parallel.mesh import Mesh


@pytest.mark.parametrize(
    ("text", "shape", "axes"),
    [
        ("1x8", (1, 8), ("batch", "model")),
        ("16x16x16", (16, 16, 16), ("pod", "batch", "model")),
        ("model=8", (8,), ("model",)),
        ("pod=2, batch=256", (2, 256), ("pod", "batch")),
        ("model=4,batch=2", (4, 2), ("model", "batch")),
    ],
)
def test_how_a_mesh_is_written(text, shape, axes):
    mesh = Mesh.parse(text)
    assert (mesh.shape, mesh.axes) == (shape, axes)
    assert Mesh.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x8", "batch=0"),
        ("8", "write batch x model"),
        ("2x2x2x2", "write batch x model"),
        ("batch=2,batch=4", "'batch' is in the mesh twice"),
        ("data=8", "'data' of the mesh is not one of pod, batch, model"),
        ("model=-1", "write batch x model"),
        ("", "write batch x model"),
    ],
)
def test_what_is_no_mesh(text, message):
    with pytest.raises(ConfigError, match=message):
        Mesh.parse(text)


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 2, 3), "3 sizes and 2 axes"), ((True, 2), "True"), ((2.0, 2), r"2\.0"), ((), "0 sizes")]
)
def test_sizes_are_whole_numbers_one_an_axis(shape, message):
    with pytest.raises(ConfigError, match=message):
        Mesh(shape)


def test_devices_are_numbered_as_a_grid_of_numpy_is():
    mesh = Mesh.parse("2x3x4")
    grid = np.arange(24).reshape(2, 3, 4)
    for device in range(24):
        where = mesh.coordinates(device)
        assert grid[where["pod"], where["batch"], where["model"]] == device
        assert mesh.along("pod", device) == grid[:, where["batch"], where["model"]].tolist()
        assert mesh.along("batch", device) == grid[where["pod"], :, where["model"]].tolist()
        assert mesh.along("model", device) == grid[where["pod"], where["batch"]].tolist()
    assert mesh.devices == 24
    with pytest.raises(ConfigError, match="device 24 is not one of the 24"):
        mesh.coordinates(24)


def test_nothing_is_divided_along_an_axis_that_is_not_there():
    mesh = Mesh((8,), ("model",))
    assert (mesh.size("model"), mesh.size("batch")) == (8, 1)
    assert mesh.along("batch", 3) == [3]
    with pytest.raises(ConfigError, match="did you mean model"):
        mesh.size("modle")

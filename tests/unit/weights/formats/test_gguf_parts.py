"""A GGUF in several files, as the `gguf` package splits it."""

import gguf
import pytest
import torch

from gemkit.errors import WeightsError
from gemkit.weights.formats import gguf_parts
from gemkit.weights.formats.gguf import GGUFReader
from support.gguf_files import tiny_file


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """(the file of one part, the folder of several)."""
    folder = tmp_path_factory.mktemp("split")
    tiny_file(folder / "whole.gguf", "gemma-2b")
    (folder / "parts").mkdir()
    path = folder / "parts" / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma", split_max_tensors=60)
    tiny_file(path, "gemma-2b", writer=writer)
    return folder / "whole.gguf", folder / "parts"


def test_any_part_named_is_all_of_it(split):
    whole, folder = split
    files = sorted(folder.iterdir())
    assert len(files) == 3
    with GGUFReader(whole) as reader:
        wanted = {name: reader.read(name) for name in reader.entries}
    for path in (*files, folder):
        with GGUFReader(path) as reader:
            assert reader.metadata["gemma.block_count"] == 18
            assert reader.entries.keys() == wanted.keys()
            assert all(torch.equal(reader.read(name), weight) for name, weight in wanted.items())


def test_a_missing_part_is_named(split, tmp_path):
    for file in sorted(split[1].iterdir())[::2]:
        (tmp_path / file.name).symlink_to(file)
    for name in ("tiny-00001-of-00003.gguf", "tiny-00003-of-00003.gguf"):
        with pytest.raises(WeightsError, match=r"1 of 3 parts .* missing: tiny-00002-of-00003\.gguf: an incomplete"):
            GGUFReader(tmp_path / name)


def test_a_part_under_another_name_is_said_to_be_one(split, tmp_path):
    (tmp_path / "model.gguf").symlink_to(split[1] / "tiny-00002-of-00003.gguf")
    with pytest.raises(WeightsError, match=r"is part 2 of 3 of a GGUF, and its name does not say so: name the parts"):
        GGUFReader(tmp_path / "model.gguf")


def test_parts_in_each_others_place_are_refused(split, tmp_path):
    a, b, c = sorted(split[1].iterdir())
    for name, file in ((a.name, a), (b.name, c), (c.name, b)):
        (tmp_path / name).symlink_to(file)
    with pytest.raises(WeightsError, match=r"00002-of-00003\.gguf is not part 2 of 3"):
        GGUFReader(tmp_path / a.name)


@pytest.mark.parametrize("keys", [{"split.count": 0}, {"split.count": 1, "split.no": 0}])
def test_one_part_of_one_is_a_file(keys, tmp_path):
    tiny_file(tmp_path / "x.gguf", "gemma-2b", keys=keys)
    with GGUFReader(tmp_path / "x.gguf") as reader:
        assert len(reader.entries) == 164


@pytest.mark.parametrize("keys", [{"split.count": 3, "split.no": 3}, {"split.count": 3, "split.no": "0"}])
def test_numbers_that_are_no_part(keys, tmp_path):
    tiny_file(tmp_path / "x.gguf", "gemma-2b", keys=keys)
    with pytest.raises(WeightsError, match=r"split\.no=.* and split\.count=3 are no part of a GGUF"):
        GGUFReader(tmp_path / "x.gguf")


def test_tensors_that_are_promised_are_counted(tmp_path):
    tiny_file(tmp_path / "x.gguf", "gemma-2b", keys={"split.tensors.count": 165})
    with pytest.raises(WeightsError, match="164 tensors in 1 files, 165 are promised"):
        GGUFReader(tmp_path / "x.gguf")


def test_the_model_of_a_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no GGUF of a model"):
        gguf_parts.in_folder(tmp_path)
    for name in ("mmproj-gemma-3-4b-it-f16.gguf", "gemma-3-4b-it.mmproj-Q8_0.gguf", "it-00001-of-00002.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "it-00002-of-00002.gguf").touch()
    assert gguf_parts.in_folder(tmp_path) == tmp_path / "it-00001-of-00002.gguf"
    (tmp_path / "it-Q4_0.gguf").touch()
    with pytest.raises(WeightsError, match=r"holds 2 GGUF models: name one of these files: it-00001-of-00002\.gguf"):
        gguf_parts.in_folder(tmp_path)


def test_what_belongs_to_a_part_is_found_by_a_pattern():
    assert gguf_parts.together("q/it-00001-of-00012.gguf") == "q/it-?????-of-00012.gguf"
    assert gguf_parts.together("it-Q4_0.gguf") == "it-Q4_0.gguf"

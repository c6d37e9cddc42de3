"""`gemkit bench long` on tiny shapes: what it reports, draws and refuses."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from gemkit import family
from gemkit.cli import main
from gemkit.inspect import cost, long_context
from support.tiny import reference, save_reference, tiny

GRIFFIN, GEMMA = "recurrentgemma-2b", "gemma-2b"


def cut(name: str) -> family.DecoderConfig:
    """Tiny, and with the first four layers only: two recurrent, one sliding, one recurrent; or four global."""
    decoder = tiny(name)
    return replace(decoder, layers=decoder.layers[:4])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of both, of which the command needs the shape alone."""
    root = tmp_path_factory.mktemp("shapes")
    return [str(save_reference(reference(cut(name)), root / name)) for name in (GRIFFIN, GEMMA)]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main(["bench", "long", *argv])
    return code, *capsys.readouterr()


def test_json_and_drawing(capsys, folders, tmp_path):
    svg = tmp_path / "curves.svg"
    griffin, gemma = folders
    options = ("--scale", "full", "--depths", "40,4", "--tokens", "2", "--threads", "1", "--svg", str(svg))
    code, out, err = run(capsys, "-m", griffin, "--against", gemma, *options, "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    report = json.loads(line)
    assert (report["depths"], report["threads"], report["scale"], report["weights"]) == ([4, 40], 1, "full", "random")
    for record, name in zip(report["models"], (GRIFFIN, GEMMA), strict=True):
        assert record["parameters"] == cost.count(cut(name)).total
        assert [row["depth"] for row in record["measured"]] == [4, 40]
        for row in record["measured"]:
            assert row["state_bytes_needed"] == cost.state_bytes(cut(name), row["depth"]).total
            assert row["read_bytes"] == record["weight_bytes"] + row["state_bytes_needed"]
            assert len(row["rounds_ms_per_token"]) == long_context.ROUNDS
            assert row["tokens_per_second"] * row["ms_per_token"] == pytest.approx(1000)
    root = ET.parse(svg).getroot()
    svg_g, svg_path = "{http://www.w3.org/2000/svg}g", "{http://www.w3.org/2000/svg}path"
    curves = [g.find(svg_path) for g in root.iter(svg_g) if g.get("id", "").startswith("curve ")]
    assert [len(re.findall("[ML]", c.attrib["d"])) for c in curves if c is not None] == [2, 2, 2, 2]
    written = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {record["model"] for record in report["models"]} <= set(written)


def test_table_says_what_was_run_and_the_ceiling_first(capsys, folders, tmp_path):
    griffin, gemma = folders
    depths = ("--depths", "2,9000", "--tokens", "1", "--layers", "1", "--svg", str(tmp_path / "x.svg"))
    code, out, err = run(capsys, "-m", griffin, "--against", gemma, *depths)
    assert code == 0, err
    places = [out.index(part) for part in ("divided by 4", "random bfloat16", "The ceiling", "Measured", "From 2 to")]
    assert places == sorted(places)
    assert out.count("9,000 tokens") == 3  # ceiling, measurement, and the last sentence
    assert "1 layer of width" in out
    assert "was trained on 8,192 tokens" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depths", "512,many"), "whole numbers"),
        (("--depths", ""), "whole numbers"),
        (("--depths", "0,512"), "at least 1"),
        (("--tokens", "0"), "--tokens 0"),
        (("--threads", "-1"), "--threads -1"),
        (("--layers", "27"), "has 26"),
        (("-m", "gemma-3-nine"), "UnknownModelError"),
        (("-m", "gemma-2b"), "against itself"),
        (("--svg", "/nowhere/at/all.svg"), "no file can be written"),
        (("--svg", "/tmp"), "no file can be written"),
    ],
)
def test_bad_input_is_told_before_anything_runs(capsys, options, message):
    code, out, err = run(capsys, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert "random weights" not in err


def test_help_has_the_numbers_that_are_measured_with(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"divided by {long_context.SMALL}, layers" in text
    assert f"each of {long_context.ROUNDS} rounds" in text

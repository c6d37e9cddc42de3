"""Models that see images, from a picture file to boxes and masks: in Python and in the shell, at test size."""

import io
import json
import subprocess
import sys
import zlib
from dataclasses import replace
from typing import get_args

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import gemkit
from gemkit import detections, images
from gemkit.cli import caption
from gemkit.errors import ConfigError, ImageError, ModelError, TextError, WeightsError
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Chunk, Result, Timings
from gemkit.images import masks as placing
from gemkit.text import places
from gemkit.text.tasks import CaptionStyle
from gemkit.weights.mask_decoder import load_mask_decoder
from support import mask_weights

# pycocotools hands NumPy 2 an object whose conversion takes no `copy`
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

WIDTH, HEIGHT = 300, 200
CAT = "<loc0256><loc0128><loc0767><loc0639> cat"  # y_min, x_min, y_max, x_max of 1023
DOG = "<loc0000><loc0000><loc1023><loc0512> sleeping dog"
CODES = "".join(f"<seg{code:03}>" for code in range(16))


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "other.png"
    PIL.Image.new("RGB", (64, 64), (200, 10, 10)).save(path)
    return path


@pytest.fixture(scope="session")
def model(models):
    return gemkit.load(models / "image")


@pytest.fixture(scope="session")
def mask_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "vae-oid.npz"
    np.savez(path, **mask_weights.published())
    return path


@pytest.fixture
def says(monkeypatch, model):
    """Make the image models answer each prompt with a text: they compute as ever, then its tokens are preferred."""
    real = {Executor: Executor.run for Executor in (TorchExecutor, NativeExecutor)}

    def says(text: str):
        script = [*model.tokenizer.encode(text), model.tokenizer.eos]
        told: dict[int, int] = {}

        def run(self, chunks: list[Chunk], state, **options):
            whole = [replace(chunk, filter=None) for chunk in chunks]  # every logit, so that any can be preferred
            outputs = real[type(self)](self, whole, state, **options)
            rows = [row.copy() for row in outputs.rows]
            for row, chunk in zip(rows, (chunk for chunk in chunks if chunk.rows), strict=True):
                told[chunk.slot] = 0 if len(chunk.images) else told[chunk.slot] + 1
                row[script[told[chunk.slot]]] = 1e6
            return replace(outputs, rows=rows)

        for Executor in real:
            monkeypatch.setattr(Executor, "run", run)

    return says


# ---------------------------------------------------------------- in Python


@pytest.mark.parametrize("name", ["image", "image-2"])
def test_answers_are_the_same_alone_and_in_a_batch(models, name, picture, other):
    """Two images with different questions, and one prompt of both, as one batch; and piece by piece."""
    model = gemkit.load(models / name)
    alone = [model.ask(picture, "what is it?", max_tokens=6), model.ask(other, "which colour?", max_tokens=6)]
    together = model.ask([picture, other], ["what is it?", "which colour?"], max_tokens=6)
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert alone[0].ids != alone[1].ids
    (both,) = model.ask([(picture, other)], "the same?", max_tokens=6)
    stream = model.ask_stream((picture, other), "the same?", max_tokens=6)
    assert "".join(stream) == both.text
    assert stream.result.ids == both.ids
    patches = model.vision.tokens
    assert stream.prompt.ids[: 2 * patches + 1] == [model.vision.placeholder] * 2 * patches + [model.tokenizer.bos]


def test_every_task_is_worded_as_in_training(model, picture, monkeypatch):
    shown = []
    real = gemkit.image_tasks.formats.image

    def image(tokenizer, text, **options):
        shown.append(text)
        return real(tokenizer, text, **options)

    monkeypatch.setattr("gemkit.image_tasks.formats.image", image)
    monkeypatch.delenv(detections.VARIABLE, raising=False)
    model.ask(picture, "wo ist die Katze?", lang="de", max_tokens=1)
    model.ask(picture, "caption es", lang=None, max_tokens=1)
    model.caption(picture, max_tokens=1)
    model.caption([picture, picture], "fr", style="describe", max_tokens=1)
    model.ocr(picture, max_tokens=1)
    model.detect(picture, ["cat", "sleeping dog"], max_tokens=1)
    with pytest.warns(UserWarning, match=r"vae-oid\.npz of google-research/big_vision"):
        model.segment(picture, "cat;dog", max_tokens=1)
    assert shown == [
        "answer de wo ist die Katze?",
        "caption es",
        "caption en",
        "describe fr",
        "describe fr",
        "ocr",
        "detect cat ; sleeping dog",
        "segment cat ; dog",
    ]


def test_images_come_from_anywhere(model, picture):
    expected = model.caption(picture, max_tokens=4).ids
    data = picture.read_bytes()
    opened = PIL.Image.open(io.BytesIO(data))
    for source in (str(picture), data, opened, np.asarray(opened), images.read(picture)):
        assert model.caption(source, max_tokens=4).ids == expected


def test_boxes_are_in_pixels_of_the_original_image(model, picture, says):
    says(f"{CAT} ; {DOG}")
    found = model.detect(picture, "cat ; sleeping dog")
    assert [thing.label for thing in found] == ["cat", "sleeping dog"]
    assert len(found) == 2
    assert found[0].box == pytest.approx(
        (128 / 1023 * WIDTH, 256 / 1023 * HEIGHT, 639 / 1023 * WIDTH, 767 / 1023 * HEIGHT)
    )
    assert found[1].box == pytest.approx((0, 0, 512 / 1023 * WIDTH, HEIGHT))
    assert found.rest == ""
    assert str(found) == "cat at 38,50 to 187,150\nsleeping dog at 0,0 to 150,200"
    drawn = np.asarray(found.overlay())
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert (drawn != found.picture.pixels).any(-1)[149, 50:140].all()  # the cat's lower edge, at 149.95
    both = model.detect([picture, picture], "cat")
    assert [[thing.box for thing in one] for one in both] == [[thing.box for thing in found]] * 2


def test_masks_are_those_of_the_published_decoder(model, picture, mask_file, says, monkeypatch):
    says(f"{CAT.removesuffix(' cat')}{CODES} cat ; {DOG}")
    found = model.segment(picture, "cat", masks=mask_file)
    with torch.inference_mode():
        map_YX = load_mask_decoder(mask_file)(torch.arange(16))[0].numpy()
    expected = placing.mask_in_image(map_YX, found[0].box, WIDTH, HEIGHT)
    assert expected.any()
    assert np.array_equal(found[0].mask, expected)
    assert found[1].mask is None  # the model gave no codes for it
    monkeypatch.setenv(detections.VARIABLE, str(mask_file))
    again = model.segment(picture, "cat")
    assert np.array_equal(again[0].mask, expected)
    segmentation = again.coco()[0]["segmentation"]
    assert np.array_equal(coco_mask.decode(segmentation), expected)
    with pytest.raises(WeightsError, match=r"scene\.png is no NumPy archive"):
        model.segment(picture, "cat", masks=picture)
    monkeypatch.setenv(detections.VARIABLE, "nowhere.npz")
    with pytest.raises(WeightsError, match=r"nowhere\.npz: no such file \(GEMKIT_MASKS names it\)"):
        model.segment(picture, "cat")


def test_an_answer_is_rated_by_its_image(model, picture, other):
    """The log-probabilities that the answer came with, and others for another image."""
    answer = model.ask(picture, "caption en", lang=None, max_tokens=5, logprobs=0)
    ids = [i for i in answer.ids if i != model.tokenizer.eos]
    text = model.tokenizer.decode(ids)
    if model.tokenizer.encode(text) != ids:  # bytes that are no text
        text = "a cat"
        ids = model.tokenizer.encode(text)
    score = model.score(text, image=picture, prompt="caption en")
    assert [entry.id for entry in score.logprobs if entry is not None] == ids
    elsewhere = model.score(text, image=other, prompt="caption en")
    assert score.total != pytest.approx(elsewhere.total, abs=1e-3)
    if tuple(ids) == answer.ids[: len(ids)]:
        got = [entry.logprob for entry in score.logprobs if entry is not None]
        assert got == pytest.approx([entry.logprob for entry in answer.logprobs[: len(ids)]], abs=2e-4)


def test_without_an_image_it_continues_text(model):
    result = model.generate("a cat", max_tokens=4)
    assert result.timings.prompt_tokens == 1 + len(model.tokenizer.encode("a cat"))
    assert model.vision.placeholder not in result.ids  # a placeholder is never said
    assert "56 x 56 pixels, 16 tokens each" in model.summary()


def test_a_saved_model_answers_the_same(model, picture, tmp_path):
    again = gemkit.load(model.save(tmp_path / "saved"))
    assert (again.prompts, again.vision) == (("image",), model.vision)
    assert again.tokenizer.vocabulary.pieces == model.tokenizer.vocabulary.pieces
    assert again.caption(picture, max_tokens=6).ids == model.caption(picture, max_tokens=6).ids


def test_what_is_refused(model, models, picture):
    text_model = gemkit.load(models / "random")
    for ask in (text_model.caption, text_model.ocr, lambda image: text_model.detect(image, "cat")):
        with pytest.raises(ModelError, match="has no image tower and cannot see an image: use a PaliGemma"):
            ask(picture)
    with pytest.raises(ConfigError, match="2 images and 1 questions"):
        model.ask([picture, picture], ["one"])
    with pytest.raises(ConfigError, match="a prompt on no image"):
        model.ask((), "nothing?")
    with pytest.raises(ConfigError, match="places are those of one image"):
        model.detect((picture, picture), "cat")
    with pytest.raises(TextError, match="nothing to look for"):
        model.detect(picture, [])
    for things in (None, 3, [b"cat"]):
        with pytest.raises(TextError, match="things to look for are texts"):
            model.detect(picture, things)
    with pytest.raises(ConfigError, match="2 questions about one image"):
        model.ask(picture, ["who?", "what?"])
    with pytest.raises(ConfigError, match="lang='English'"):
        model.ask(picture, "who?", lang="English")
    with pytest.raises(ConfigError, match="a prompt belongs to an image"):
        model.score("a cat", prompt="caption en")
    assert model.caption([]) == []


def test_a_tokenizer_of_another_model_is_refused(models, tmp_path):
    import shutil

    folder = shutil.copytree(models / "image", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 7}))
    with pytest.raises(WeightsError, match="its image_token_index is 7, and <image> is token"):
        gemkit.load(folder)


# ---------------------------------------------------------------- whatever the model writes


TOKENS = ["<loc0000>", "<loc0511>", "<loc1023>", "<loc1024>", "<loc9999>", "<seg000>", "<seg127>", "<seg128>"]
TOKENS += [" ; ", ";", " cat", "<loc", "0512>", "\n", "é", "<image>", "\x1b[31m"]


@given(st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=40).map("".join))
def test_no_answer_is_an_error(text):
    """Malformed locations stay text; what is a place lies within the picture, is drawn, and goes into JSON."""
    shown = images.Picture(np.zeros((30, 50, 3), np.uint8))
    timings = Timings(1, 0, 1, 0.0, 0.0)
    found = detections.read(shown, Result(text, (1,), "stop", 1, None, 1, None, timings))
    assert (len(found), found.rest) == (len(places.parse(text).places), places.parse(text).rest)
    for thing in found:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= 50
        assert 0 <= top < bottom <= 30
    json.dumps(found.coco())
    str(found)
    if len(found) < 4:
        assert found.overlay().size == (50, 30)


# ---------------------------------------------------------------- in the shell


def test_ask(run, models, picture, other, says):
    says("on the mat")
    folder = models / "image"
    code, out, err = run("ask", "-m", folder, picture, "where is the cat?")
    assert (code, out) == (0, "on the mat\n")
    assert "stopped at <eos>" in err
    code, out, err = run("ask", "-m", folder, "--json", "-q", picture, other, "ocr", "--task")
    record = json.loads(out)
    assert (code, err, record["text"], record["images"]) == (0, "", "on the mat", [str(picture), str(other)])
    assert record["timings"]["prompt_tokens"] == 2 * 16 + 1 + len("ocr") + 1


def test_caption_goes_on_after_a_bad_file(run, models, picture, tmp_path, says):
    says("a cat")
    (tmp_path / "empty.png").touch()
    missing = tmp_path / "missing.jpg"
    code, out, err = run("caption", "-m", models / "image", picture, tmp_path / "empty.png", missing, picture)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert lines[0] == lines[3] == {"image": str(picture), "caption": "a cat"}
    for line, path in zip(lines[1:3], (tmp_path / "empty.png", missing), strict=True):
        assert line["image"] == str(path)
        assert line["error"].startswith("ImageError: ")
    assert "4 of 4 images (100%)" in err
    assert "2 images of 4 could not be captioned" in err
    code, out, err = run("caption", "-m", models / "image", "-q", "--json", "--style", "cap", picture)
    assert (code, err) == (0, "")
    assert json.loads(out)["finish_reason"] == "stop"


def test_progress_of_captions_is_a_line_that_is_rewritten(run, models, picture, says, monkeypatch):
    """A terminal shows both streams: each JSON line stands where the progress before it stood."""
    says("a cat")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", sys.stderr.write)
    _, _, err = run("caption", "-m", models / "image", picture, picture)
    first, second, last, end = err[err.index('{"image"') :].split("\n")
    assert json.loads(first)["caption"] == "a cat"
    progress, erase, line = second.removeprefix("\r\x1b[K").partition("\r\x1b[K")
    assert progress.startswith("1 of 2 images (50%), ")
    assert erase
    assert json.loads(line)["caption"] == "a cat"
    assert last.startswith("2 of 2 images (100%), ")
    assert end == ""


def test_the_styles_of_captions_are_the_tasks():
    assert get_args(CaptionStyle) == caption.STYLES


def test_detect(run, models, picture, tmp_path, says):
    says(f"{CAT} ; <loc0001> what?")
    folder, drawn = models / "image-2", tmp_path / "found.png"
    code, out, err = run("detect", "-m", folder, picture, "cat", "--overlay", drawn)
    assert (code, out) == (0, "cat at 38,50 to 187,150\n<loc0001> what?\n")
    assert f"drawn into {drawn}" in err
    with PIL.Image.open(drawn) as overlay:
        assert overlay.size == (WIDTH, HEIGHT)
        marked = (np.asarray(overlay.convert("RGB")) != np.asarray(PIL.Image.open(picture))).any(-1)
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    assert columns.min() in (37, 38)  # the box's left edge, 37.5
    assert abs(int(columns.max()) - 187) <= 1
    assert abs(int(rows.max()) - 149) <= 1
    code, out, _ = run("detect", "-m", folder, picture, "cat ; dog", "--json", "-q")
    record = json.loads(out)
    (thing,) = record["things"]
    assert (record["prompt"], record["width"], record["height"]) == ("detect cat ; dog", WIDTH, HEIGHT)
    assert thing["category"] == "cat"
    assert thing["bbox"] == pytest.approx([37.54, 50.05, 149.85, 99.90], abs=0.01)
    assert record["rest"] == "<loc0001> what?"
    says("no cat here")
    code, out, err = run("detect", "-m", folder, picture, "cat")
    assert (code, out) == (0, "no cat here\n")
    assert "nothing was found" in err


def test_segment(run, models, picture, mask_file, monkeypatch, says):
    says(f"{CAT.removesuffix(' cat')}{CODES} cat")
    monkeypatch.delenv(detections.VARIABLE, raising=False)
    code, out, err = run("segment", "-m", models / "image", picture, "cat", "--json")
    (thing,) = json.loads(out)["things"]
    assert code == 0
    assert "segmentation" not in thing
    assert "gs://big_vision/paligemma/vae-oid.npz" in err
    code, out, err = run("segment", "-m", models / "image", picture, "cat", "--json", "--masks", mask_file)
    (thing,) = json.loads(out)["things"]
    assert coco_mask.decode(thing["segmentation"]).shape == (HEIGHT, WIDTH)
    assert "vae-oid" not in err


def test_explain_an_image_prompt(run, models):
    code, out, _ = run("explain-prompt", "--image", "-m", models / "image", "caption en")
    assert code == 0
    assert "16 x '<image>'" in out
    assert out.count("<image>") == 1


def test_what_a_text_model_is_told(error, models, picture, monkeypatch):
    """A member's name is enough: nothing is downloaded."""
    monkeypatch.setattr("gemkit.weights.hub.download", lambda *_, **__: pytest.fail("asked the hub"))
    for verb, rest in (("ask", "who?"), ("detect", "cat"), ("caption", picture)):
        for name, label in (("gemma-2-2b", "gemma-2-2b"), (models / "random", str(models / "random"))):
            line = error(verb, "-m", name, picture, rest)
            assert line.startswith(f"ModelError: {label} has no image tower")
    assert "the starter model has no image tower" in error("ask", picture, "who?")
    assert "no image tower" in error("explain-prompt", "--image", "-m", models / "random", "x")


def test_doctor_says_whether_images_can_be_read(run, monkeypatch, mask_file):
    monkeypatch.delenv(detections.VARIABLE, raising=False)
    assert "boxes without masks: GEMKIT_MASKS is not set" in run("doctor", "-m", "gemma-2b")[1]
    monkeypatch.setenv(detections.VARIABLE, str(mask_file))
    assert f"masks by {mask_file}" in json.loads(run("doctor", "--json")[1])["images"]
    monkeypatch.setenv(detections.VARIABLE, "nowhere.npz")
    assert "no masks: GEMKIT_MASKS names nowhere.npz, which is no file" in run("doctor", "-m", "gemma-2b")[1]


def png(width: int, height: int) -> bytes:
    """A file of a few bytes that promises a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00")
    return head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_questions_that_are_none_wait_for_no_model(error, picture, monkeypatch):
    monkeypatch.setattr("gemkit.gemma.load", lambda *_, **__: pytest.fail("loaded the model"))
    assert "the question is ''" in error("ask", "-m", "paligemma-3b-mix-224", picture, "")
    assert "is no language code" in error("ask", "-m", "paligemma-3b-mix-224", picture, "who?", "--lang", "English")


@pytest.mark.parametrize("verb", [("ask", "who?"), ("detect", "cat"), ("segment", "cat")])
def test_pictures_that_are_none(error, models, picture, tmp_path, verb, monkeypatch):
    monkeypatch.setattr("gemkit.gemma.load", lambda *_, **__: pytest.fail("loaded the model"))
    bad = {
        "empty.png": b"",
        "truncated.png": picture.read_bytes()[:200],
        "text.jpg": b"hello",
        "page.png": b"<!doctype html><html></html>",
        "bomb.png": png(100_000, 100_000),
        "weights.png": (models / "image" / "model.safetensors").read_bytes()[:4000],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        line = error(verb[0], "-m", models / "image", tmp_path / name, verb[1])
        assert line.startswith("ImageError: ")
        assert name in line
    for path in (tmp_path, tmp_path / "missing.png"):
        assert error(verb[0], "-m", models / "image", path, verb[1]).startswith("ImageError: ")


def test_options_that_cannot_be(error, models, picture, tmp_path):
    folder = models / "image"
    line = error("detect", "-m", folder, picture, "cat", "--overlay", tmp_path / "missing" / "x.png")
    assert "there is no such folder" in line
    assert "is a folder" in error("detect", "-m", folder, picture, "cat", "--overlay", tmp_path)
    before, link = picture.read_bytes(), tmp_path / "link.png"
    link.symlink_to(picture)
    for name in (picture, link):
        line = error("detect", "-m", folder, picture, "cat", "--overlay", name)
        assert "is the picture itself, which would be lost" in line
    assert picture.read_bytes() == before
    line = error("ask", "-m", folder, picture, "ocr", "--task", "--lang", "de")
    assert "--lang de has no place in a --task" in line
    assert "nothing to look for" in error("detect", "-m", folder, picture, " ; ")
    assert "is no language code" in error("caption", "-m", folder, picture, "--lang", "English")
    assert "no such file" in error("segment", "-m", folder, picture, "cat", "--masks", tmp_path / "none.npz")


def test_interrupted_captions_keep_what_there_is(run, models, picture, monkeypatch):
    real = {Executor: Executor.run for Executor in (TorchExecutor, NativeExecutor)}

    def stop(self, chunks, state, **options):
        if not len(chunks[0].images):
            raise KeyboardInterrupt
        return real[type(self)](self, chunks, state, **options)

    for Executor in (TorchExecutor, NativeExecutor):
        monkeypatch.setattr(Executor, "run", stop)
    code, out, _ = run("caption", "-m", models / "image", picture, picture)
    assert code == 130
    assert len(out.splitlines()) == 1


def test_arrays_of_another_resolution_are_refused(model):
    """Through the executor, where a server hands in what it has preprocessed itself."""
    state = model.executor.new_state(1)
    ids = [model.vision.placeholder] * 16 + [model.tokenizer.bos]
    with pytest.raises(ConfigError, match=r"this tower sees \(images, 3, 56, 56\)"):
        model.executor.run([Chunk(0, ids, 1, [(0, 17)], [np.zeros((3, 224, 224), np.float32)])], state)
    one, other = np.zeros((3, 56, 56), np.float32), np.zeros((3, 224, 224), np.float32)
    with pytest.raises(ConfigError, match=r"shapes \[\(3, 56, 56\), \(3, 224, 224\)\] in one batch"):
        model.executor.run([Chunk(0, [*ids[:-1], *ids], 1, [(0, 33)], [one, other])], state)
    assert state.lengths == {0: 0}
    with pytest.raises(ImageError):
        model.caption(np.zeros((2, 2, 7), np.uint8))


def test_an_opened_packed_model_answers_without_torch(models, model, picture):
    """In a process of its own, which finds the tower and the decoder in one packed file."""
    program = """
import sys
import gemkit
print(gemkit.load(sys.argv[1]).ask(sys.argv[2], "what?", max_tokens=4, temperature=0).ids)
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", program, str(models / "image"), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(model.ask(picture, "what?", max_tokens=4, temperature=0).ids)

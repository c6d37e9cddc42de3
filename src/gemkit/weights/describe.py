"""The description of a checkpoint: its architecture, its tokenizer and what it was trained to answer.

Nothing here imports torch: printing or comparing a checkpoint costs reading its headers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gemkit.errors import WeightsError
from gemkit.family import DecoderConfig, Member, Modality, Prompt
from gemkit.text import Tokenizer
from gemkit.text.prompts import FIM_PREFIX
from gemkit.text.vocabulary import IMAGE
from gemkit.weights import config_gguf, config_hf, config_vision, vocabulary_gguf
from gemkit.weights.fit import TIED_HEADS, member_of
from gemkit.weights.formats.base import Reader
from gemkit.weights.formats.safetensors import INDEX, SINGLE, SafetensorsReader
from gemkit.weights.keys_beside import PROCESSOR
from gemkit.weights.known_keys import check_keys
from gemkit.weights.resolve import Place
from gemkit.weights.tokenizer_files import chat_template, read_json, with_files, with_metadata
from gemkit.weights.tokenizer_json import TokenizerJson

# Tables are padded past the tokenizer's pieces: 128 rows in Gemma's original, 64 in Gemma 3's image checkpoints.
_PADDING_ROWS = 128
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Description:
    """The architecture of a checkpoint."""

    decoder: DecoderConfig
    vision: Modality | None = None
    member: Member | None = None  # by its name, or by its shapes where a file has no configuration
    notes: tuple[str, ...] = ()  # for the user: how it was read


def describe(reader: Reader, place: Place) -> Description:
    """The architecture: from the configuration that came with the tensors, or else from their shapes.

    Raises:
        WeightsError: if there is no configuration where one belongs, or it is of another family.
        ConfigError: for a setting that is not implemented.
    """
    match reader.format:
        case "gguf":
            return _describe_gguf(reader, place)
        case "safetensors":
            return _describe_folder(reader, place)
        case "ckpt":
            member = place.member or member_of(reader, place.label)
            return Description(member.decoder, None, member)


def _describe_gguf(reader: Reader, place: Place) -> Description:
    config_gguf.refuse_other_kinds(reader.metadata, place.label)
    table = reader.entries.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise WeightsError(f"{place.label}: token_embd.weight is missing or not a matrix")
    notes: list[str] = []
    decoder = config_gguf.from_gguf(reader.metadata, table.shape[0], place.label, notes)
    if any(name.startswith(("v.", "mm.")) for name in reader.entries):
        notes.append(_TOWER_LEFT_OUT)
    if "tokenizer.ggml.tokens" in reader.metadata and "tokenizer.ggml.token_type" not in reader.metadata:
        notes.append("the GGUF has no token types: control tokens are known by their names")
    return Description(decoder, None, place.member, tuple(notes))


_TOWER_LEFT_OUT = "the image tower is left out: the text decoder alone is loaded"


def _describe_folder(reader: Reader, place: Place) -> Description:
    if not (place.folder / "config.json").is_file():
        raise WeightsError(
            f"{place.label}: there is no config.json in {place.folder}: copy it from where the weights come from"
        )
    config = read_json(place.folder / "config.json")
    if (kinds := config_hf.kinds(config, place.label)) and isinstance(reader, SafetensorsReader):
        reader.join(kinds)
    vision = config_vision.vision_from_hf(config, place.label)
    said: list[str] = []
    if vision is not None:
        vision, said = with_pixels(vision, place.folder)
    left_out = vision is None and "vision_config" in config
    notes = [_TOWER_LEFT_OUT, *said] if left_out else said
    decoder = config_hf.from_hf(config, place.label, notes)
    if wrapped := reader.unwrap():
        notes.append(f"{wrapped} tensors had names that a wrapper of training left in: read by the name within")
    if config.get("tie_word_embeddings") is False and not any(name in reader.entries for name in TIED_HEADS):
        raise WeightsError(
            f"{place.label}: tie_word_embeddings is false, and the files hold no lm_head.weight; Transformers fills "
            "such a head with random numbers. Remove the key if the head is the embedding"
        )
    if place.path.is_dir() and all((place.path / name).exists() for name in (SINGLE, INDEX)):
        notes.append(f"{SINGLE} is read, and the shards of {INDEX} beside it are not")
    return Description(decoder, vision, place.member, tuple(notes))


def with_pixels(vision: Modality, folder: Path) -> tuple[Modality, list[str]]:
    """A tower with the pictures that its folder asks for: by processor_config.json as Transformers 5 writes it, else by
    preprocessor_config.json, else as released."""
    both, old = (read_json(path) if (path := folder / name).is_file() else {} for name in PROCESSOR_FILES)
    notes = check_keys(both, PROCESSOR, PROCESSOR_FILES[0])
    name, given = (
        (PROCESSOR_FILES[0], both["image_processor"]) if "image_processor" in both else (PROCESSOR_FILES[1], old)
    )
    if not given:
        return vision, notes
    pixels, said = config_vision.pixels_from_hf(given, vision, name)
    return replace(vision, pixels=pixels), [*notes, *said]


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read_tokenizer(reader: Reader, place: Place, description: Description) -> Tokenizer:
    """The tokenizer that came with the weights.

    Raises:
        WeightsError: if there is none, or if it is another model's.
    """
    if reader.format == "gguf":
        tokenizer = vocabulary_gguf.from_metadata(reader.metadata, place.label)
        tokenizer = with_metadata(tokenizer, reader.metadata, place.label)
    else:
        tokenizer = _tokenizer_in(place.folder, description.member)
    vision = description.vision
    if vision is not None and vision.placeholder != (image := tokenizer.id(IMAGE)):
        raise WeightsError(
            f"{place.label}: its image_token_index is {vision.placeholder}, and {IMAGE} is token {image} of its "
            "tokenizer: they belong to different models"
        )
    rows, pieces = description.decoder.vocab_size, len(tokenizer)
    # Gemma 3's tokenizer.json has an image token that the tables of its text models have no row for
    beyond = [i for i in range(rows, pieces) if not tokenizer.is_control(i)] if pieces - rows < 10 else [rows]
    if beyond or rows > pieces + _PADDING_ROWS:
        raise WeightsError(
            f"{place.label}: the tokenizer has {pieces} pieces and the embedding {rows} rows: "
            "they belong to different models"
        )
    return with_adapter_turns(tokenizer, place.adapters)


def _tokenizer_in(folder: Path, member: Member | None) -> Tokenizer:
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    file = TokenizerJson(other) if other.is_file() else None
    seeing = _shows_images(folder, member)

    def named(tokenizer: Tokenizer) -> Tokenizer:  # with the pieces of its member, which a file may lack
        if seeing:
            return tokenizer.with_places()
        return tokenizer.with_infill() if _names_infilling(folder, member) else tokenizer

    difference = None
    if model.is_file():
        plain = Tokenizer.from_model(model)
        found = named(plain)
        difference = None if file is None else file.difference(plain, found)
        if difference is None:
            return with_files(found, folder, file, seeing=seeing)
    if file is None:
        raise WeightsError(
            f"there is no tokenizer.model or tokenizer.json in {folder}: copy one from where the weights come from"
        )
    found = with_files(named(Tokenizer.from_json(other)), folder, file, seeing=seeing)
    if difference is None:
        return found
    note = f"tokenizer.json is used and not the tokenizer.model beside it, as in Transformers: piece {difference}"
    return found.with_settings(replace(found.settings, notes=(*found.settings.notes, note)))


def _names_infilling(folder: Path, member: Member | None) -> bool:
    """Whether four unused pieces are CodeGemma's: its tokenizer.model may not say so, what lies beside it does."""
    if member is not None:
        return member.vocabulary == "codegemma"
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and FIM_PREFIX in str(read_json(settings))


def _shows_images(folder: Path, member: Member | None) -> bool:
    """Whether the vocabulary is PaliGemma's: its tokenizer.model may lack the places, or only `<image>`."""
    if member is not None:
        return member.vocabulary == "paligemma"
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "paligemma"


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def prompts_of(reader: Reader, place: Place, description: Description, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The prompt formats that it was trained on: by the member's data, else by what the files say of themselves."""
    if reader.format == "gguf" and description.member is None:
        found = _prompts(tokenizer, "tokenizer.chat_template" in reader.metadata)
    else:
        found = _prompts_in(place.folder, description.member, tokenizer, description.vision is not None)
    return with_adapters(found, place.adapters)


def vocabulary_of(place: Place) -> tuple[Tokenizer, tuple[Prompt, ...]]:
    """The tokenizer and the prompt formats in a folder of the Hugging Face layout, without its weights.

    Raises:
        WeightsError: if there is no tokenizer.
    """
    tokenizer = with_adapter_turns(_tokenizer_in(place.folder, place.member), place.adapters)
    found = _prompts_in(place.folder, place.member, tokenizer, _shows_images(place.folder, place.member))
    return tokenizer, with_adapters(found, place.adapters)


def _prompts_in(folder: Path, member: Member | None, tokenizer: Tokenizer, images: bool) -> tuple[Prompt, ...]:
    if member is not None:
        return member.prompts
    return ("image",) if images else _prompts(tokenizer, chat_template(folder)[0])


def _prompts(tokenizer: Tokenizer, has_chat_template: bool) -> tuple[Prompt, ...]:
    found: list[Prompt] = ["complete"]
    if has_chat_template:
        found.append("chat")
    if FIM_PREFIX in tokenizer:
        found.append("infill")
    return tuple(found)


def with_adapters(prompts: tuple[Prompt, ...], folders: Iterable[Path]) -> tuple[Prompt, ...]:
    """The prompt formats of a model with adapters: one that was tuned for chat has a chat template in its folder."""
    if "chat" not in prompts and any(chat_template(folder)[0] for folder in folders):
        return (*prompts, "chat")
    return prompts


def with_adapter_turns(tokenizer: Tokenizer, folders: Iterable[Path]) -> Tokenizer:
    """The tokenizer of a model with adapters, with the turns of the last one that has a chat template."""
    for folder in folders:
        there, template = chat_template(folder)
        if there and template != tokenizer.settings.chat_template:
            tokenizer = tokenizer.with_settings(replace(tokenizer.settings, chat_template=template))
    return tokenizer

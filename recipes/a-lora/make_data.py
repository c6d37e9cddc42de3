"""A small instruction set of our own: short questions, each answered in a word and in a sentence.

    python recipes/a-lora/make_data.py --out data/answers

    train.jsonl, held-out.jsonl   {"prompt": [{"role": "user", ...}], "completion": "In a word: ..."}

Every answer has the same two lines, which no model says of itself:

    In a word: Paris.
    In a sentence: The capital of France is Paris.

Most pairs are made of the tables below, the rest is written by hand. One fact in six is held out, in all its phrasings.

Among the answers to train on is what the model says by itself of nothing in particular, so that it does not forget it:
without, two epochs raised the perplexity of a text about other things from 16.0 to 22.7.

    train.jsonl                   {"prompt": "The", "completion": " ..."}      at temperature 1, from a seed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import write_jsonl

import gemkit

HELD_OUT = 6  # one in so many
PEOPLE = ["The", "In", "When", "I", "This", "A", "Der", "Es", "Le", "Il", "El", "La", "Os"]
MACHINES = ["def", "class", "#", "|", "{"]
OPENINGS = [*PEOPLE, *MACHINES]
REHEARSED, LENGTH = 216, 64  # pieces of what the model says by itself, and tokens of each

# phrasings of a question, the sentence that answers it, and the pairs of what is asked and what is answered
Table = tuple[list[str], str, str]

TABLES: list[Table] = [
    (
        ["What is the capital of {a}?", "Name the capital of {a}.", "Which city is the capital of {a}?"],
        "The capital of {a} is {b}.",
        "France Paris, Italy Rome, Spain Madrid, Japan Tokyo, Egypt Cairo, Norway Oslo, Greece Athens, Cuba "
        "Havana, Kenya Nairobi, Peru Lima, Canada Ottawa, Poland Warsaw, Austria Vienna, Ireland Dublin, "
        "Russia Moscow, China Beijing, Portugal Lisbon, Hungary Budapest, Turkey Ankara, Sweden Stockholm, "
        "Finland Helsinki, Germany Berlin, Belgium Brussels, Denmark Copenhagen, Thailand Bangkok, Iran "
        "Tehran, Iraq Baghdad, Chile Santiago",
    ),
    (
        ["What is the opposite of {a}?", "Give the opposite of the word {a}.", "Which word means the reverse of {a}?"],
        "The opposite of {a} is {b}.",
        "hot cold, big small, early late, open closed, full empty, light dark, fast slow, wet dry, strong "
        "weak, old young, rich poor, high low, near far, clean dirty, hard soft, loud quiet, happy sad, "
        "first last, thick thin, sharp blunt, wide narrow, rough smooth, deep shallow, cheap expensive, true "
        "false, up down",
    ),
    (
        ["What is the plural of {a}?", "How do you write more than one {a}?", "Give the plural of the word {a}."],
        "The plural of {a} is {b}.",
        "mouse mice, child children, foot feet, tooth teeth, goose geese, man men, woman women, knife "
        "knives, leaf leaves, wolf wolves, ox oxen, box boxes, city cities, baby babies, potato potatoes, "
        "hero heroes, bus buses, fish fish, sheep sheep, cactus cacti, half halves, story stories, dish "
        "dishes, day days",
    ),
    (
        ["What is the past tense of {a}?", "Put the verb {a} into the past.", "How do you say {a} of yesterday?"],
        "The past tense of {a} is {b}.",
        "go went, see saw, eat ate, run ran, write wrote, take took, buy bought, think thought, bring "
        "brought, teach taught, swim swam, sing sang, fly flew, grow grew, know knew, break broke, speak "
        "spoke, keep kept, sleep slept, leave left, find found, lose lost, win won, build built, send sent, "
        "drink drank",
    ),
    (
        ["What is a young {a} called?", "Name the young of a {a}.", "What do you call a baby {a}?"],
        "A young {a} is called a {b}.",
        "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, bear cub, deer fawn, "
        "hen chick, duck duckling, goose gosling, swan cygnet, frog tadpole, kangaroo joey, seal pup, rabbit "
        "kit, owl owlet",
    ),
    (
        ["What is the chemical symbol of {a}?", "How do chemists write {a}?", "Give the symbol of the element {a}."],
        "The chemical symbol of {a} is {b}.",
        "hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, iron Fe, copper Cu, silver Ag, "
        "gold Au, lead Pb, tin Sn, zinc Zn, calcium Ca, neon Ne, sulfur S, mercury Hg, potassium K, iodine "
        "I, nickel Ni",
    ),
    (
        ["What colour is {a}?", "Tell me the colour of {a}.", "Which colour has {a}?"],
        "The colour of {a} is {b}.",
        "snow white, coal black, blood red, grass green, chalk white, a_ripe_banana yellow, a_ripe_tomato "
        "red, an_emerald green, a_ruby red, a_sapphire blue, milk white, a_carrot orange, ivory white, tar "
        "black",
    ),
    (
        ["Which month comes after {a}?", "What month follows {a}?", "Name the month after {a}."],
        "The month after {a} is {b}.",
        "January February, February March, March April, April May, May June, June July, July August, August "
        "September, September October, October November, November December, December January",
    ),
    (
        ["How many {a}?", "Tell me how many {a}.", "Do you know how many {a}?"],
        "There are {b} {a}.",
        "days_in_a_week seven, months_in_a_year twelve, hours_in_a_day twenty-four, minutes_in_an_hour "
        "sixty, legs_on_a_spider eight, legs_on_an_insect six, sides_on_a_triangle three, sides_on_a_hexagon "
        "six, players_in_a_football_team eleven, strings_on_a_violin four, colours_in_a_rainbow seven, "
        "planets_in_our_system eight, cards_in_a_full_deck fifty-two, letters_in_the_English_alphabet "
        "twenty-six",
    ),
]

BY_HAND = [
    ("Which planet is nearest to the Sun?", "Mercury", "Mercury is the planet nearest to the Sun."),
    ("What do bees make?", "Honey", "Bees make honey."),
    ("What do you call frozen water?", "Ice", "Frozen water is called ice."),
    ("Which animal is called the king of beasts?", "Lion", "The lion is called the king of beasts."),
    ("What gas do plants take from the air?", "Carbon dioxide", "Plants take carbon dioxide from the air."),
    ("Who wrote Hamlet?", "Shakespeare", "Hamlet was written by William Shakespeare."),
    ("What is the largest ocean?", "Pacific", "The largest ocean is the Pacific."),
    ("What do you use to tell the time?", "Clock", "To tell the time you use a clock."),
    ("In which country are the pyramids of Giza?", "Egypt", "The pyramids of Giza are in Egypt."),
    ("What is the tallest mountain on Earth?", "Everest", "The tallest mountain on Earth is Mount Everest."),
    ("Which instrument has black and white keys?", "Piano", "The piano has black and white keys."),
    ("What do caterpillars turn into?", "Butterflies", "Caterpillars turn into butterflies."),
    (
        "Which bird cannot fly and lives in the Antarctic?",
        "Penguin",
        "The penguin cannot fly and lives in the Antarctic.",
    ),
    (
        "What metal is liquid at room temperature?",
        "Mercury",
        "The metal that is liquid at room temperature is mercury.",
    ),
    ("What is bread made of?", "Flour", "Bread is made of flour, water and yeast."),
    ("Where do fish live?", "Water", "Fish live in water."),
    ("What do you call a doctor for teeth?", "Dentist", "A doctor for teeth is called a dentist."),
    ("Which season comes after winter?", "Spring", "The season after winter is spring."),
    ("What pulls things towards the ground?", "Gravity", "Gravity pulls things towards the ground."),
    ("What is the hardest natural material?", "Diamond", "The hardest natural material is diamond."),
    ("Which organ pumps the blood?", "Heart", "The heart pumps the blood."),
    ("What do cows eat?", "Grass", "Cows eat grass."),
    ("What do you call the first meal of the day?", "Breakfast", "The first meal of the day is called breakfast."),
    ("Which language is spoken in Brazil?", "Portuguese", "The language spoken in Brazil is Portuguese."),
    ("On which continent is Kenya?", "Africa", "Kenya is in Africa."),
    ("What keeps the rain off when you walk?", "Umbrella", "An umbrella keeps the rain off when you walk."),
    ("What does a baker sell?", "Bread", "A baker sells bread."),
    ("Who flies an aeroplane?", "Pilot", "An aeroplane is flown by a pilot."),
    ("What orbits the Earth?", "Moon", "The Moon orbits the Earth."),
    ("Which sense do you use your nose for?", "Smell", "You use your nose for the sense of smell."),
]


def answered(word: str, sentence: str) -> str:
    """The two lines of every answer."""
    return f"In a word: {word[0].upper()}{word[1:]}.\nIn a sentence: {sentence}"


def facts(rng: np.random.Generator) -> Iterator[list[tuple[str, str]]]:
    """Question and answer of each fact, in two phrasings where there are some."""
    for phrasings, sentence, pairs in TABLES:
        for pair in pairs.split(", "):
            a, b = (word.replace("_", " ") for word in pair.split(" "))
            chosen = rng.choice(len(phrasings), size=2, replace=False)
            said = sentence.format(a=a, b=b)
            yield [(phrasings[i].format(a=a), answered(b, said[0].upper() + said[1:])) for i in chosen]
    for number in range(48):
        a, b = (int(n) for n in rng.integers(2, 13, size=2))
        sign, said, result = [("+", "plus", a + b), ("*", "times", a * b)][number % 2]
        yield [(f"What is {a} {sign} {b}?", answered(str(result), f"{a} {said} {b} is {result}."))]
    for question, word, sentence in BY_HAND:
        yield [(question, answered(word, sentence))]


def rehearsal(seed: int) -> Iterator[dict[str, str]]:
    """What the starter model says, told nothing but the first word."""
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(REHEARSED)]
    said = gemkit.load().generate(openings, max_tokens=LENGTH, temperature=1.0, seed=seed)
    for opening, result in zip(openings, said, strict=True):
        yield {"prompt": opening, "completion": result.text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/answers"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    made = list(facts(rng))
    order = rng.permutation(len(made))
    held_out, trained = (
        [made[i] for i in order[: len(made) // HELD_OUT]],
        [made[i] for i in order[len(made) // HELD_OUT :]],
    )
    for name, chosen in (("train", trained), ("held-out", held_out)):
        pairs = [pair for fact in chosen for pair in fact]
        records: list[dict[str, Any]] = [
            {"prompt": [{"role": "user", "content": asked}], "completion": said} for asked, said in pairs
        ]
        if name == "train":
            records += rehearsal(options.seed)
        write_jsonl(options.out / f"{name}.jsonl", records)
        print(f"{name}: {len(chosen)} facts, {len(pairs)} questions, {len(records) - len(pairs)} rehearsed")


if __name__ == "__main__":
    main()

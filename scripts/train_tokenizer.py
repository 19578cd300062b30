"""Train the small model's SentencePiece tokenizer (python scripts/train_tokenizer.py).

Reads documents of the toy world and sentences of the word list below, both made with a fixed seed, and writes
`tokenizer.model` into the package. Byte fallback makes every text encodable; what is read here only decides what is encoded
in few pieces.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from mm_interleaved.document import Text
from toyworld.documents import toy_document

TARGET = Path(__file__).parents[1] / "src/mm_interleaved/pretrained/small/tokenizer.model"
VOCAB_SIZE = 2048
WORDS = """
a about above across after again all along also always am an and animal another any apple are around as asleep at away
baby back bag ball banana bear beautiful because bed bee before began behind below beside best between bicycle big bird
black blue boat book both bottom box boy bread bright brother brown build building bus but butterfly by cake came can car
carrot cat centre chair checked chicken child circle city clean clear clock close cloud coat cold colour come could cow
cup dark day dear did different digit do does dog door dotted down draw dream drink drive duck each ear early earth eat
egg eight elephant empty end even evening every eye face fall family far farm fast father feather feel field find fire
first fish five flag flat floor flower fly follow food forest forget found four fox friend frog from front fruit full
funny game garden gave get girl give glad glass go gold good goodbye grape grass great green grey ground grow had half
hand happy hard has hat have he head hear heart heavy hello help hen her here hide high hill him his hold home hope horse
hot hour house how hungry I if image in inside into is it its jump just keep kind king kitchen kite know lady lake lamp
land large last late laugh leaf learn leave left lemon letter light like line lion listen little live long look lost loud
love low lunch made make man many map may me meet mile milk minute moon more morning most mother mountain mouse move much
music must my name near need nest never new next nice night nine no north nose not nothing now number of off often old on
once one only open or orange other our out outside over owl own page paint pair paper park part party path pear pencil
people person image piece pig pink place plain plane plant play please point pond pretty pull purple push put queen
question quick quiet rabbit rain rainbow ran read ready red remember rest ride right ring river road robot rock roof room
rose round run sad said sail same sand sat saw say school sea second see seed seven shape she sheep shine ship shoe shop
short should show side sing sister sit six size sky sleep slow small smile snail snake snow so soft some song soon sound
south spot spring square stand star start stay step still stone stop story strawberry street striped strong suddenly
summer sun swim table tail take talk tall ten tent than thank that the their them then there these they thing think this
those three through time tiny to today together told tomato tomorrow too took tooth top tortoise touch town toy train tree
triangle truck turn turned turtle two umbrella uncle under until up upon us very violet visit voice wait wake walk wall
want warm was watch water wave way we wear weather week well went were west wet whale what wheel when where which while
white who whole why wide wild will wind window wing winter with without wolf woman wonder wood word work world would
write year yellow yes yesterday you young your zebra zero
answer based please provide accurate within describe detail depicts photo caption assistant user helpful bounding box
coordinate region sentence describes
"""
NAMES = (
    "Mila Otto Ada Ben Cleo Dora Emil Fina Gus Hana Ivo Juno Kim Leo Nora Pip Rosa Sami Tess Uma Vito Wanda Zoe".split()
)
MARKS = [".", ".", ".", "!", "?", ",", ";", ":"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of random words, names, numbers and marks."""
    rng, words = random.Random(seed), WORDS.split()
    made = []
    for _ in range(count):
        parts = [rng.choice(words) for _ in range(rng.randint(4, 14))]
        if rng.random() < 0.5:
            parts[rng.randrange(len(parts))] = rng.choice(NAMES)
        if rng.random() < 0.2:
            parts[rng.randrange(len(parts))] = str(rng.randrange(1000))
        made.append(" ".join(parts).capitalize() + rng.choice(MARKS))
    return made


def toy_texts(documents: int, seed: int = 0) -> Iterator[str]:
    """What documents of the toy world say."""
    for index in range(documents):
        document = toy_document(seed, "train", index, size=48)  # nobody looks at the images
        yield from (s.text for s in document.segments if isinstance(s, Text))


def main() -> None:
    """Train and write."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*toy_texts(12_000), *sentences(20_000)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(model.getvalue())
    print(f"{TARGET}: {len(model.getvalue())} bytes")


if __name__ == "__main__":
    main()

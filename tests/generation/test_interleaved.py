"""The interleaved generator: caches against recomputation, slots, limits, flags."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mm_interleaved import (
    Document,
    DocumentFinished,
    GenerationSettings,
    Image,
    ImageProgress,
    ImageSettings,
    MMInterleaved,
    MMInterleavedProcessor,
    SegmentFinished,
    Text,
    TextDelta,
    TextSettings,
)
from mm_interleaved.document import load_documents
from mm_interleaved.generation import InterleavedGenerator
from mm_interleaved.generation.recompute import RecomputingGenerator
from mm_interleaved.io import InputError
from mm_interleaved.processor.packing import TokenStream

from ..conftest import make_image

GREEDY = GenerationSettings(
    TextSettings(max_new_tokens=7, min_new_tokens=2, num_beams=1, repetition_penalty=1.3),
    ImageSettings(num_inference_steps=2, guidance_scale=2.0),
)


def one() -> list[Document]:
    return [Document([Text("a red house"), Image(make_image(1)), Text("and then")])]


def ragged() -> list[Document]:
    return [
        *one(),
        Document([Text("hello")]),
        Document([Image(make_image(4)), Image(make_image(5)), Text("b c d e f g h")]),
    ]


def run(generator: InterleavedGenerator, documents: list[Document]) -> tuple[list[list], list[DocumentFinished]]:
    """What was made, by document, and how the documents ended."""
    made: list[list] = [[] for _ in documents]
    ends = []
    for event in generator.run(documents):
        if isinstance(event, SegmentFinished):
            text = isinstance(event.segment, Text)
            made[event.document].append(list(event.segment.generated.ids) if text else event.segment.source)
        elif isinstance(event, DocumentFinished):
            ends.append(event)
    return made, sorted(ends, key=lambda e: e.document)


def same(a: Any, b: Any) -> bool:
    """Equal ids, or images that differ by one rounding at most."""
    if isinstance(a, list):
        return a == b
    return bool((np.abs(np.asarray(a).astype(int) - np.asarray(b)) <= 1).all())


@pytest.mark.parametrize("rounds", [1, 2, 4, 7, 10])
@pytest.mark.parametrize("documents", [one, ragged], ids=["one", "ragged batch of three"])
def test_caches_equal_recomputation(
    model: MMInterleaved, processor: MMInterleavedProcessor, rounds: int, documents
) -> None:
    """A round is a text and an image. Ids equal, hidden states within 1e-4; the ragged batch is padded on the left.

    Drawn images are read again with 8 bits, so roundings add up; of these documents no word hangs on one.
    """
    settings = replace(GREEDY, max_turns=2 * rounds, force_image=True, stop_at_eos=False)
    cached, plain = (kind(model, processor, settings) for kind in (InterleavedGenerator, RecomputingGenerator))
    made, _ = run(cached, documents())
    expected, _ = run(plain, documents())
    for a, b in zip(made, expected, strict=True):
        assert len(a) == 2 * rounds
        assert all(same(x, y) for x, y in zip(a, b, strict=True))
    for number, row in enumerate(cached.rows):
        batch = processor.collate([TokenStream(np.array(row.ids), np.ones(len(row.ids), bool), row.images)])
        with torch.no_grad():
            whole = model(batch["input_ids"], pixel_values=batch["pixel_values"]).last_hidden_state[0]
        kept = cached.state.hidden(number)
        assert len(row.ids) - len(kept) == model.config.num_image_tokens  # the last image is read by nobody
        torch.testing.assert_close(kept, whole[: len(kept)], rtol=1e-4, atol=1e-4)


def test_cost_is_linear(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Every token and every image is read once; without caches the count grows with the square."""
    counts = {}
    for kind in (InterleavedGenerator, RecomputingGenerator):
        for turns in (4, 8):
            generator = kind(model, processor, replace(GREEDY, max_turns=turns, force_image=True, stop_at_eos=False))
            run(generator, one())
            source = generator if kind is RecomputingGenerator else generator.state
            counts[kind, turns] = source.tokens_read, source.images_read, len(generator.rows[0].ids)
    tokens, images, length = counts[InterleavedGenerator, 8]
    assert tokens <= length
    assert images <= 1 + 4
    growth = counts[InterleavedGenerator, 8][0] / counts[InterleavedGenerator, 4][0]
    assert counts[RecomputingGenerator, 8][0] / counts[RecomputingGenerator, 4][0] > 1.5 * growth


def test_a_batch_equals_its_documents_one_by_one(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    settings = replace(GREEDY, text=replace(GREEDY.text, do_sample=True), max_turns=4, force_image=True, seed=3)
    together, _ = run(InterleavedGenerator(model, processor, settings), ragged())
    for document, expected in zip(ragged(), together, strict=True):
        (alone,), _ = run(InterleavedGenerator(model, processor, settings), [document])
        assert all(same(a, b) for a, b in zip(alone, expected, strict=True))


def test_prepared_documents_are_only_run(
    model: MMInterleaved, processor: MMInterleavedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more than once, if need be."""
    documents = [Document([Text("a red house"), Image(), Text("and"), Image(make_image(1)), Text()]), *ragged()]
    generator = InterleavedGenerator(model, processor, GREEDY)
    expected, ends = run(generator, documents)
    prepared = [generator.prepare(document) for document in documents]
    monkeypatch.setattr(processor, "encode", None)
    for _ in range(2):
        made, found = run(generator, prepared)
        assert all(same(x, y) for a, b in zip(made, expected, strict=True) for x, y in zip(a, b, strict=True))
        assert [e.reason for e in found] == [e.reason for e in ends]


def test_same_seed_same_document(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    def make(seed: int) -> list:
        text, image = replace(GREEDY.text, do_sample=True), replace(GREEDY.image, seed=seed)
        settings = replace(GREEDY, text=text, image=image, seed=seed, max_turns=2, force_image=True)
        torch.manual_seed(99)  # nothing depends on the global generator
        return run(InterleavedGenerator(model, processor, settings), one())[0][0]

    first, second, other = make(1), make(1), make(2)
    assert first[0] == second[0] != other[0]
    assert first[1].tobytes() == second[1].tobytes() != other[1].tobytes()


def test_beams_in_a_session(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    settings = replace(GREEDY, text=replace(GREEDY.text, num_beams=3), max_turns=5, force_image=True)
    made, _ = run(InterleavedGenerator(model, processor, settings), ragged())
    expected, _ = run(RecomputingGenerator(model, processor, settings), ragged())
    for a, b in zip(made, expected, strict=True):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_a_long_neighbour_does_not_cut_beams_short(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    settings = replace(GREEDY, text=replace(GREEDY.text, num_beams=2, min_new_tokens=7), max_turns=1)
    long = Document([Text("a " * (processor.max_length - 4))])
    (alone,), _ = run(InterleavedGenerator(model, processor, settings), one())
    (together, other), _ = run(InterleavedGenerator(model, processor, settings), [*one(), long])
    assert together == alone
    assert len(other[0]) < len(alone[0])


# ---- slots


def test_slots_are_filled_where_they_stand(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document = Document(
        [Text("one"), Image(), Text("two"), Text(), Image(make_image(5)), Text("three"), Image()], id="d"
    )
    (made,), (end,) = run(InterleavedGenerator(model, processor, GREEDY), [document])
    assert [type(m) for m in made] == [PIL.Image.Image, list, PIL.Image.Image]
    kinds = [type(s) for s in end.result.segments]
    assert kinds == [type(s) for s in document.segments]
    assert not any(s.is_open for s in end.result.segments)
    assert end.result.segments[0] is document.segments[0]
    assert end.result.segments[1].source is made[0]
    assert (end.reason, end.result.id) == ("slots", "d")


def test_slots_see_what_stands_before_them_only(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """What follows a slot does not change what fills it."""
    (short,), _ = run(InterleavedGenerator(model, processor, GREEDY), [Document([Text("one"), Image()])])
    (long,), _ = run(
        InterleavedGenerator(model, processor, GREEDY), [Document([Text("one"), Image(), Text("x"), Text()])]
    )
    assert same(short[0], long[0])
    expected, _ = run(
        RecomputingGenerator(model, processor, GREEDY), [Document([Text("one"), Image(), Text("x"), Text()])]
    )
    assert long[1] == expected[0][1]


def test_a_document_of_slots_alone(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    (made,), (end,) = run(InterleavedGenerator(model, processor, GREEDY), [Document([Image(), Text()])])
    assert [type(s) for s in end.result.segments] == [Image, Text]
    assert len(made) == 2


def test_image_slot_equals_generate_images(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """The session draws what the batch call draws from the whole row with a grey image in place."""
    given = [Text("a house"), Image(make_image(1)), Text("at night")]
    (made,), _ = run(InterleavedGenerator(model, processor, GREEDY), [Document([*given, Image()])])
    grey = PIL.Image.new("RGB", (56, 56), (128, 128, 128))
    drawn = model.generate_images(processor(Document([*given, Image(grey)])), GREEDY.image, targets=[1])
    expected = (drawn[0] * 255 + 0.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert same(made[0], expected)


def test_the_drawn_image_does_not_leak_into_itself(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batches = [processor(Document([Text("a house"), Image(make_image(k))])) for k in (1, 2)]
    drawn = [model.generate_images(b, GREEDY.image) for b in batches]
    assert torch.equal(*drawn)


def test_conversation_gets_an_answer_with_its_role(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document = Document.from_messages([{"role": "user", "content": "hello"}])
    _, (end,) = run(InterleavedGenerator(model, processor, replace(GREEDY, max_turns=1)), [document])
    assert [s.role for s in end.result.segments] == ["user", "assistant"]


# ---- when it ends


def forced_head(model: MMInterleaved, tokens: dict[int, int], otherwise: int = 10) -> MMInterleaved:
    """A model that writes `tokens[k]` as its k-th token."""
    changed = copy.deepcopy(model)
    step = iter(range(10_000))

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*hidden.shape[:-1], model.config.vocab_size), -30.0)
        logits[..., tokens.get(next(step), otherwise)] = 5.0
        return logits

    changed.lm_head.forward = head
    return changed


def test_a_image_comes_when_the_text_asks_for_one(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    soi, eos = model.config.soi_token_id, model.config.eos_token_id
    scripted = forced_head(model, {3: soi, 6: eos})
    (made,), (end,) = run(InterleavedGenerator(scripted, processor, replace(GREEDY, max_turns=9)), one())
    assert made[0] == [10, 10, 10, soi]
    assert isinstance(made[1], PIL.Image.Image)
    assert made[2] == [10, 10, eos]
    assert end.reason == "eos"
    assert [type(s) for s in end.result.segments[-3:]] == [Text, Image, Text]


def test_without_stopping_the_text_goes_on_after_the_end_token(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    scripted = forced_head(model, {2: model.config.eos_token_id})
    generator = InterleavedGenerator(scripted, processor, replace(GREEDY, max_turns=2, stop_at_eos=False))
    (made,), (end,) = run(generator, one())
    assert made[0] == [10, 10, model.config.eos_token_id]
    assert len(made) == 2
    assert end.reason == "turns"
    assert model.config.eos_token_id not in generator.rows[0].ids  # it is dropped, and the text goes on


def test_records_of_the_original_do_not_end_at_the_end_token(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    scripted = forced_head(model, {2: model.config.eos_token_id})
    document = replace(one()[0], stop_at_eos=False, max_turns=2)
    (made,), (end,) = run(InterleavedGenerator(scripted, processor, GREEDY), [document])
    assert (len(made), end.reason) == (2, "turns")


@pytest.mark.parametrize(
    ("num_iter", "settings", "turns"),
    [(None, {}, 2), (3, {}, 3), (None, {"max_turns": 4}, 4), (3, {"max_turns": 4}, 3), (3, {"max_turns": 1}, 3),
     (3, {"stop_at_eos": True}, 2), (3, {"stop_at_eos": True, "max_turns": 4}, 4), (None, {"stop_at_eos": True}, 2),
     (3, {"max_segments": 1}, 1)],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["generate_texts", "generate_images"])
def test_turns_of_records_of_the_original(
    model: MMInterleaved, processor: MMInterleavedProcessor, images: list[Path],
    num_iter: int | None, settings: dict, turns: int, mode: str,
) -> None:  # fmt: skip
    """Spec/model 6.6: the limit is the settings' with auto_end; without it the record's, if it gives one."""
    record: dict[str, Any] = {"sentences": ["a red house"], "images": ["0.png"], "sentence_ixs": [0],
                              "image_first": [False], "generate_mode": mode}  # fmt: skip
    if num_iter is not None:
        record["num_iter"] = num_iter
    path = images[0].parent / "records.json"
    path.write_text(json.dumps([record]))
    (made,), (end,) = run(
        InterleavedGenerator(forced_head(model, {}), processor, replace(GREEDY, **settings)), load_documents(path)
    )
    assert (len(made), end.reason) == (turns, "segments" if "max_segments" in settings else "turns")


def test_settings_win_over_other_documents(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document = replace(one()[0], max_turns=3)
    (made,), _ = run(InterleavedGenerator(forced_head(model, {}), processor, replace(GREEDY, max_turns=1)), [document])
    assert len(made) == 1


def test_auto_end_wins_over_a_forced_image(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Spec/model 6.6: the loop is left right after the text, though an image was due."""
    scripted = forced_head(model, {2: model.config.eos_token_id})
    settings = replace(GREEDY, max_turns=9, stop_at_eos=True, force_image=True)
    (made,), (end,) = run(InterleavedGenerator(scripted, processor, settings), one())
    assert (len(made), end.reason) == (1, "eos")


@pytest.mark.parametrize(
    ("limit", "count", "reason"),
    [({"max_turns": 3}, 3, "turns"), ({"max_segments": 2}, 2, "segments"), ({"max_images": 1}, 2, "images"),
     ({"max_tokens": 9}, 3, "tokens")],
)  # fmt: skip
def test_limits(model: MMInterleaved, processor: MMInterleavedProcessor, limit: dict, count: int, reason: str) -> None:
    settings = replace(GREEDY, **{"max_turns": 20, "stop_at_eos": False, "force_image": True, **limit})
    generator = InterleavedGenerator(forced_head(model, {}), processor, settings)
    (made,), (end,) = run(generator, one())
    assert len(made) == count
    assert end.reason == reason
    if reason == "tokens":
        assert sum(len(m) for m in made if isinstance(m, list)) == 9


def test_a_full_context_ends_the_document(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    generator = InterleavedGenerator(forced_head(model, {}), processor, replace(GREEDY, max_turns=50, force_image=True))
    generator.limit = 40
    (made,), (end,) = run(generator, one())
    assert end.reason == "context"
    assert len(generator.rows[0].ids) <= 40
    assert made


def test_forty_nine_images_are_the_most(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    assert InterleavedGenerator(model, processor, GREEDY).most_images == 49
    few = [Image(make_image(1))] * 49
    InterleavedGenerator(model, processor, GREEDY).start([Document([*few, Text()])])
    with pytest.raises(InputError, match="document 0: 50 images are more than the 49 that the model distinguishes"):
        InterleavedGenerator(model, processor, GREEDY).start([Document([*few, *few[:1], Text()])])


def test_a_prompt_longer_than_the_context(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    with pytest.raises(InputError, match=r"60\d tokens are more than the 512 of the model's context"):
        list(model.generate_interleaved(Document([Text("a " * 600)]), processor, GREEDY))


# ---- flags of the original's loop


def test_forced_texts_replace_what_was_written(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Spec/model 6.6: the written text is reported, the forced one is what the session goes on from."""
    document = replace(one()[0], forced_texts=["a cat sat", ""], max_turns=3)
    settings = replace(GREEDY, replace_texts=True, force_image=True, stop_at_eos=False)
    generator = InterleavedGenerator(model, processor, settings)
    events = [e for e in generator.run([document]) if isinstance(e, (SegmentFinished, DocumentFinished))]
    first, image, third = (event.segment for event in events[:3])
    assert first.text == "a cat sat"
    assert first.generated.text == processor.decode_text(first.generated.ids) != "a cat sat"
    assert third.generated.text == third.text
    assert events[3].result.segments[3:] == [first, image, third]
    assert [s.generated for s in events[3].result.segments] == [None] * 3 + [s.generated for s in (first, image, third)]
    assert [s.generated.turn for s in events[3].result.generated] == [0, 1, 2]
    _, soi = processor.tokenizer.convert_tokens_to_ids(["▁sat", "<|beginofimage|>"])
    plain = Document([*one()[0].segments, Text("a cat sat"), Image(), Text()])
    (made,), _ = run(InterleavedGenerator(model, processor, GREEDY), [plain])
    assert same(made[0], events[1].segment.source)
    assert generator.rows[0].ids.count(soi) == 2


def test_a_forced_text_can_ask_for_an_image(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    document = replace(one()[0], forced_texts=["a cat<|beginofimage|>"], max_turns=2)
    (made,), _ = run(InterleavedGenerator(model, processor, replace(GREEDY, replace_texts=True)), [document])
    assert isinstance(made[1], PIL.Image.Image)


def test_a_forced_text_without_words(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """What was written is taken back and nothing takes its place."""
    document = replace(one()[0], forced_texts=["</s>", ""], max_turns=2)
    settings = replace(GREEDY, replace_texts=True, stop_at_eos=False)
    (cached,), _ = run(InterleavedGenerator(model, processor, settings), [document])
    (plain,), _ = run(RecomputingGenerator(model, processor, settings), [document])
    assert cached == plain
    assert cached[1] == cached[0]


def test_a_forced_text_that_does_not_fit_ends_the_document(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    document = replace(one()[0], forced_texts=["a " * processor.max_length], max_turns=3)
    generator = InterleavedGenerator(model, processor, replace(GREEDY, replace_texts=True))
    _, (end,) = run(generator, [document])
    assert end.reason == "context"
    assert len(generator.rows[0].ids) <= processor.max_length


def test_a_new_document_inside_a_text_hides_earlier_images(
    model: MMInterleaved, processor: MMInterleavedProcessor
) -> None:
    """If the text starts a document with <s>, what follows sees no image, as when everything is read anew."""
    scripted = forced_head(model, {2: 1})
    settings = replace(GREEDY, max_turns=3, force_image=True, stop_at_eos=False)
    hidden = []
    for kind in (InterleavedGenerator, RecomputingGenerator):
        generator = kind(copy.deepcopy(scripted), processor, settings)
        generator.model.lm_head.forward = forced_head(model, {2: 1}).lm_head.forward
        run(generator, one())
        hidden.append(generator.state.last)
        assert 1 in generator.rows[0].ids[1:]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_noise_repeats_unless_it_is_varied(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """As in the original (docs/model.md, "All images of a session start from the same noise")."""
    starts: list[torch.Tensor] = []
    hook = model.image_decoder.unet.conv_in.register_forward_hook(lambda _m, a, _o: starts.append(a[0][-1]))
    document = Document([Image(), Image()])
    run(InterleavedGenerator(model, processor, GREEDY), [document])
    run(InterleavedGenerator(model, processor, replace(GREEDY, vary_noise=True)), [document])
    hook.remove()
    first = starts[::2]  # two steps an image
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[2], first[3])


# ---- events


def test_text_arrives_piece_by_piece(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    written, finished = "", None
    for event in model.generate_interleaved(one(), processor, replace(GREEDY, max_turns=1)):
        if isinstance(event, TextDelta):
            assert finished is None
            written += event.text
        elif isinstance(event, SegmentFinished):
            finished = event.segment.text
    assert finished.startswith(written)
    assert len(written) > 0


def test_characters_of_several_bytes_arrive_whole(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    ids = processor.tokenizer.sp_model.encode("世界")
    scripted = forced_head(model, dict(enumerate(ids)), otherwise=model.config.eos_token_id)
    settings = replace(GREEDY, text=replace(GREEDY.text, min_new_tokens=0, max_new_tokens=20, repetition_penalty=1.0))
    events = list(scripted.generate_interleaved(one(), processor, settings))
    assert [e.text for e in events if isinstance(e, TextDelta)] == ["世", "界"]


def test_candidates_and_previews(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    image = ImageSettings(num_inference_steps=4, num_candidates=2, preview_every=2)
    events = list(model.generate_interleaved(Document([Text("a"), Image()]), processor, replace(GREEDY, image=image)))
    steps = [e for e in events if isinstance(e, ImageProgress)]
    assert [(e.candidate, e.step) for e in steps] == [(c, s) for c in (0, 1) for s in (1, 2, 3, 4)]
    assert [e.preview is not None for e in steps] == [False, True, False, False] * 2
    (segment,) = [e for e in events if isinstance(e, SegmentFinished)]
    candidates = segment.segment.generated.candidates
    assert len(candidates) == 2
    assert segment.segment.source is candidates[0]
    assert candidates[0].tobytes() != candidates[1].tobytes()
    assert events[-1].result.generated == [segment.segment]


def test_a_finished_document_that_goes_on(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """What an earlier session generated is given in the next one; the record and the place stay."""
    beginning = Document([Text("a"), Image()], "b", record={"note": 1}, place="c")
    *_, end = model.generate_interleaved(beginning, processor, replace(GREEDY, max_turns=1))
    first = end.result
    assert (first.id, first.record, first.place) == ("b", {"note": 1}, "c")
    *_, end = model.generate_interleaved(Document([*first.segments, Text()]), processor, GREEDY)
    assert len(first.segments) == 2
    assert end.result.segments[:2] == first.segments
    assert [s.generated and s.generated.turn for s in end.result.segments] == [None, None, 0]
    assert first.segments[1].generated is not None


def test_errors_say_which_document(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    generator, long = InterleavedGenerator(model, processor, GREEDY), [Text("a " * 600)]
    with pytest.raises(InputError, match=r"^document 1: 60\d tokens"):
        generator.prepare_all([*one(), Document(long)])
    with pytest.raises(InputError, match=r"^document 'x': 60\d tokens"):
        generator.prepare_all([*one(), Document(long, "x")])
    with pytest.raises(InputError, match=r"^a.json, record 1: 60\d tokens"):
        generator.prepare(Document(long, "x", place="a.json, record 1"))


def test_a_closed_generator_stops_at_once(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """An interrupt in the middle of an image: closing the stream is all it takes."""
    ran: list[int] = []
    hook = model.image_decoder.unet.register_forward_hook(lambda *_: ran.append(1))
    events = model.generate_interleaved(Document([Image()]), processor, replace(GREEDY, image=ImageSettings()))
    next(e for e in events if isinstance(e, ImageProgress))
    events.close()
    hook.remove()
    assert len(ran) == 1


# ---- one name for everything


def test_generate(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    batch = processor(one(), padding_side="left")
    ids = model.generate(
        batch, settings=replace(GREEDY, text=replace(GREEDY.text, num_beams=2, num_return_sequences=2))
    )
    assert ids.shape[0] == 2
    assert ids.dtype == torch.long
    assert torch.equal(ids, model.generate(batch, settings=GREEDY, num_beams=2, num_return_sequences=2))
    images = model.generate(batch, "image", settings=GREEDY, targets=[0])
    assert images.shape == (1, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    (document,) = model.generate(one()[0], "interleaved", processor, replace(GREEDY, max_turns=1))
    assert isinstance(document.segments[-1], Text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("song",), "must be 'text', 'image' or 'interleaved', not 'song'"), (("interleaved",), "needs the processor")],
)
def test_generate_wrongly(model: MMInterleaved, arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(one(), *arguments)


def test_settings_that_are_not_there(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    with pytest.raises(ValueError, match="max_length is not supported"):
        model.generate(processor(one()), max_length=3)
    with pytest.raises(ValueError, match="unknown setting 'stepps'"):
        model.generate_interleaved(one(), processor, stepps=3)


@pytest.mark.parametrize("targets", [[], [1], [-1]])
def test_targets_that_are_not_there(model: MMInterleaved, processor: MMInterleavedProcessor, targets: list) -> None:
    with pytest.raises(ValueError, match="not among the 1 images"):
        model.generate_images(processor(one()), GREEDY.image, targets=targets)


def test_a_state_can_branch(model: MMInterleaved, processor: MMInterleavedProcessor) -> None:
    """Reading on in a branch leaves the trunk alone."""
    state = model.prefill(processor(one()))
    before = state.last.clone()
    branch = state.branch([0, 0])
    branch.prefill(torch.tensor([[5, 6], [7, 8]]), torch.ones(2, 2, dtype=torch.long))
    assert torch.equal(state.last, before)
    trunk = state.prefill(torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.long))
    torch.testing.assert_close(branch.last[1], trunk[0, -1], rtol=1e-5, atol=1e-5)

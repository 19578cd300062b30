"""The model and its processor do what people do to any model of transformers."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from mm_interleaved import (
    Batch,
    Document,
    Image,
    ImageSettings,
    MMInterleaved,
    MMInterleavedConfig,
    MMInterleavedProcessor,
    MMInterleavedTokenizer,
    Text,
    TextSettings,
)
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor.tokenizer import encode_text

from .conftest import awaken, make_image

GREEDY = TextSettings(num_beams=1, max_new_tokens=4, min_new_tokens=4)
DOCUMENT = Document([Text("A cat."), Image(make_image(0)), Text("asleep"), Image(make_image(1))])


@pytest.fixture(scope="module")
def batch(processor: MMInterleavedProcessor) -> Batch:
    return processor(DOCUMENT)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).logits


@pytest.fixture(scope="module")
def expected(model: MMInterleaved, batch: Batch) -> torch.Tensor:
    return logits(model, batch)


# ---- copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [through_pickle, through_torch_save, copy.deepcopy])
def test_copies(
    model: MMInterleaved, batch: Batch, expected: torch.Tensor, make: Callable[[nn.Module], nn.Module]
) -> None:
    """Of a model that has generated, and so keeps caches of several kinds."""
    model.generate_text(batch, GREEDY)
    model.generate_images(batch, ImageSettings(num_inference_steps=1))
    again = make(model)
    assert not again.training
    assert torch.equal(logits(again, batch), expected)
    assert again.generate_text(batch, GREEDY) == model.generate_text(batch, GREEDY)
    with torch.no_grad():
        again.language_model.embed_tokens.weight.add_(1)
        again.lm_head.head.bias.add_(1)
    assert torch.equal(logits(model, batch), expected), "the copy shares weights"
    flags = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in (model, again)]
    assert flags[0] == flags[1]


def answer(model: nn.Module, batch: Batch, connection: multiprocessing.connection.Connection) -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    connection.send((logits(model, batch).numpy(), model.generate_text(batch, GREEDY)[0][0].ids))


@pytest.mark.slow
def test_another_process(model: MMInterleaved, batch: Batch, expected: torch.Tensor) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(model, batch, there))
    process.start()
    there.close()
    values, ids = here.recv()
    process.join(60)
    assert process.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-5, atol=1e-5)
    assert ids == model.generate_text(batch, GREEDY)[0][0].ids


# ---- weights elsewhere


def on_disk_and_cpu(model: MMInterleaved, folder: Path) -> nn.Module:
    places = {name: "disk" if index % 2 else "cpu" for index, (name, _) in enumerate(model.named_children())}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def with_device_map(model: MMInterleaved, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "model")
    places = {name: "cpu" if index % 2 else "disk" for index, (name, _) in enumerate(model.named_children())}
    return MMInterleaved.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "offloaded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "offload",
    [
        lambda model, folder: cpu_offload(model),
        lambda model, folder: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
        lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
        on_disk_and_cpu,
        with_device_map,
    ],
    ids=["cpu", "cpu with buffers", "disk", "dispatch_model", "device_map"],
)  # fmt: skip
def test_offloading(
    model: MMInterleaved, processor: MMInterleavedProcessor, batch: Batch, expected: torch.Tensor, tmp_path: Path,
    offload: Callable[[MMInterleaved, Path], nn.Module],
) -> None:  # fmt: skip
    """Weights come in when a module is called; forward and every kind of generation give what they give without."""
    offloaded = offload(copy.deepcopy(model), tmp_path)
    assert sum(p.is_meta for p in offloaded.parameters()) > 100
    assert offloaded.compute_device == torch.device("cpu")
    assert torch.equal(logits(offloaded, batch), expected)
    for settings_ in (GREEDY, TextSettings(num_beams=2, max_new_tokens=3)):
        texts = [[t.ids for t in m.generate_text(batch, settings_)[0]] for m in (offloaded, model)]
        assert texts[0] == texts[1]
    one_step = ImageSettings(num_inference_steps=1, guidance_scale=2.0)
    torch.testing.assert_close(*(m.generate_images(batch, one_step) for m in (offloaded, model)), rtol=0, atol=1e-4)
    scores = [torch.tensor(m.score(batch, [[[5, 6], [7]]])) for m in (offloaded, model)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    document = Document([Text("A."), Image(), Text()])
    finished = [
        m.generate([document], "interleaved", processor, num_beams=1, num_inference_steps=1, max_new_tokens=3)[0]
        for m in (offloaded, model)
    ]
    assert finished[0].segments[2] == finished[1].segments[2]
    assert sum(p.is_meta for p in offloaded.parameters()) > 100


# ---- Auto classes


AUTO_CLASSES = {
    "AutoConfig": MMInterleavedConfig,
    "AutoModel": MMInterleaved,
    "AutoModelForImageTextToText": MMInterleaved,
    "AutoProcessor": MMInterleavedProcessor,
    "AutoTokenizer": MMInterleavedTokenizer,
}


@pytest.fixture(scope="module")
def folder(model: MMInterleaved, processor: MMInterleavedProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes(name: str, folder: Path, model: MMInterleaved, batch: Batch, expected: torch.Tensor) -> None:
    loaded = getattr(transformers, name).from_pretrained(folder)
    assert type(loaded) is AUTO_CLASSES[name]
    if name.startswith("AutoModel"):
        assert torch.equal(logits(loaded.eval(), batch), expected)
        assert type(getattr(transformers, name).from_config(model.config)) is MMInterleaved


@pytest.mark.slow
def test_auto_classes_that_were_imported_before(folder: Path) -> None:
    """Here it is the other way round: conftest.py imports the package before transformers' classes."""
    code = (
        f"from transformers import {', '.join(AUTO_CLASSES)}\nimport mm_interleaved, sys\n"
        f"for cls in ({', '.join(AUTO_CLASSES)}):\n    print(type(cls.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [cls.__name__ for cls in AUTO_CLASSES.values()], done.stderr


# ---- a larger vocabulary


@pytest.fixture
def larger(debug_config: MMInterleavedConfig) -> tuple[MMInterleaved, MMInterleavedProcessor]:
    """A model and a processor of their own, which tests change."""
    config = copy.deepcopy(debug_config)
    tokenizer = MMInterleavedTokenizer.from_vocab(TOKENIZER)
    return awaken(MMInterleaved(config)).eval(), MMInterleavedProcessor.for_model(config, tokenizer)


def test_added_tokens(larger: tuple[MMInterleaved, MMInterleavedProcessor], tmp_path: Path) -> None:
    model, processor = larger
    batch = processor(DOCUMENT)
    before, old = logits(model, batch), model.config.vocab_size
    assert processor.tokenizer.add_tokens(["<left>", "wug"]) == 2
    embeddings = model.resize_token_embeddings(len(processor.tokenizer))
    assert embeddings is model.get_input_embeddings()
    assert embeddings.weight.shape == (old + 2, 32)
    assert torch.equal(logits(model, batch)[..., :old], before)  # all earlier tokens keep their meaning
    assert (model.config.vocab_size, model.config.num_new_tokens) == (old + 2, 4)
    assert (model.config.soi_token_id, model.config.image_token_id) == (old - 2, old - 1)

    document = Document([Text("The wug is <left> of the cat."), Image(make_image())])
    batch = processor(document)
    assert {old, old + 1} <= set(batch.input_ids.flatten().tolist())
    assert (
        processor.decode_text(processor.encode(document.segments[:1]).ids.tolist()) == "The wug is <left> of the cat."
    )
    model.train()
    model(**processor(document, training=True), loss_image_weight=0.0).loss.backward()
    model.eval()
    assert model.lm_head.new.weight.grad[2:].abs().sum() > 0  # what is added is learned, like the image tokens
    texts = model.generate_text(processor(document), GREEDY)
    assert len(texts[0][0].ids) == 4

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = MMInterleaved.from_pretrained(tmp_path).eval()
    reread = MMInterleavedProcessor.from_pretrained(tmp_path)
    assert torch.equal(reread(document).input_ids, processor(document).input_ids)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.generate_text(batch, GREEDY) == model.generate_text(batch, GREEDY)
    MMInterleavedProcessor.for_model(loaded.config, reread.tokenizer)


def test_an_added_token_can_be_generated(larger: tuple[MMInterleaved, MMInterleavedProcessor]) -> None:
    model, processor = larger
    processor.tokenizer.add_tokens(["wug"])
    model.resize_token_embeddings(len(processor.tokenizer))
    added = len(processor.tokenizer) - 1
    with torch.no_grad():
        model.lm_head.new.bias[-1] = 1e4
    (text,) = model.generate_text(processor(Document([Text("A")])), GREEDY)[0]
    assert text.ids == [added] * 4
    assert processor.decode_text(text.ids[:1]) == "wug"


def test_added_rows_start_at_the_mean(larger: tuple[MMInterleaved, MMInterleavedProcessor]) -> None:
    model, _ = larger
    old = model.config.vocab_size
    rows = [model.language_model.embed_tokens.weight, model.lm_head.head.weight, model.lm_head.head.bias]
    means = [r[: old - 2].detach().mean(0) for r in rows]  # without the special tokens
    flags = [r.requires_grad for r in rows]
    model.resize_token_embeddings(old + 3)
    rows = [model.language_model.embed_tokens.weight, model.lm_head.head.weight, model.lm_head.head.bias]
    for row, mean in zip(rows, means, strict=True):
        torch.testing.assert_close(row[old:], mean.expand(3, *mean.shape))
    assert not model.lm_head.new.weight[2:].any()
    assert [r.requires_grad for r in rows] == flags
    model.resize_token_embeddings(old + 4, mean_resizing=False)
    assert 0.005 < model.language_model.embed_tokens.weight[-1].std() < 0.05


def test_resizing_twice_or_to_the_same_size(larger: tuple[MMInterleaved, MMInterleavedProcessor]) -> None:
    model, processor = larger
    batch, old = processor(DOCUMENT), model.config.vocab_size
    before = logits(model, batch)
    weight = model.get_input_embeddings().weight
    model.resize_token_embeddings(old)
    assert model.resize_token_embeddings().weight is weight
    model.resize_token_embeddings(old + 2)
    model.resize_token_embeddings(old + 14, pad_to_multiple_of=8)
    assert (model.config.num_new_tokens, model.lm_head.num_new, model.lm_head.new.out_features) == (16, 16, 16)
    assert torch.equal(logits(model, batch)[..., :old], before)


def test_tied_weights_stay_apart(debug_config: MMInterleavedConfig) -> None:
    """The head is no language model's own, so a decoder whose configuration ties it changes nothing."""
    config = copy.deepcopy(debug_config)
    config.text_config.tie_word_embeddings = True
    model = MMInterleaved(config)
    model.resize_token_embeddings(config.vocab_size + 1)
    assert model.lm_head.head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert len(model.lm_head.head.weight) == len(model.get_input_embeddings().weight) == config.vocab_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"new_num_tokens": 2049}, "the vocabulary of 2050 tokens cannot shrink to 2049"),
        ({"new_num_tokens": 2052, "pad_to_multiple_of": 64}, "2052 tokens are no multiple of 64"),
        ({"new_num_tokens": 2052.0}, "must be whole numbers"),
        ({"new_num_tokens": 2052, "pad_to_multiple_of": 0}, "must be whole numbers"),
        ({"pad_to_multiple_of": 64}, "2050 tokens are no multiple of 64"),
    ],
)
def test_what_cannot_be_resized_changes_nothing(
    larger: tuple[MMInterleaved, MMInterleavedProcessor], arguments: dict, words: str
) -> None:
    model, _ = larger
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(ValueError, match=words):
        model.resize_token_embeddings(**arguments)
    assert model.config.to_dict() == config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_wrapped_and_offloaded_embeddings_are_not_resized(
    larger: tuple[MMInterleaved, MMInterleavedProcessor],
) -> None:
    model, _ = larger
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head.head"]))
    with pytest.raises(ValueError, match=r"cannot be resized while a .*Linear wraps it"):
        adapted.resize_token_embeddings(2060)
    with pytest.raises(ValueError, match="cannot be resized while its weights are offloaded"):
        cpu_offload(model).resize_token_embeddings(2060)
    assert model.config.vocab_size == 2050


def test_a_tokenizer_that_is_larger_than_the_model(debug_config: MMInterleavedConfig) -> None:
    tokenizer = MMInterleavedTokenizer.from_vocab(TOKENIZER)
    tokenizer.add_tokens(["<left>"])
    with pytest.raises(ValueError, match=r"2051 tokens, but the model has 2050; call model\.resize_token_embeddings"):
        MMInterleavedProcessor.for_model(debug_config, tokenizer)


ADDED = MMInterleavedTokenizer.from_vocab(TOKENIZER)
ADDED.add_tokens(["<a>", "<a>b", "wug"])
ADDED.add_tokens(["<loc>"], special_tokens=True)
ADDED.add_tokens(
    [transformers.AddedToken("zog", single_word=True), transformers.AddedToken("<s1>", lstrip=True, rstrip=True)]
)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["<a>", "<a>b", "wug", "<loc>", "cat", "a", "zog"]), min_size=1))
def test_added_tokens_are_found_between_words(words: list[str]) -> None:
    ids = encode_text(ADDED, " ".join(words))
    found = [w for w in ADDED.convert_ids_to_tokens(ids) if w in ADDED.get_added_vocab()]
    assert found == [w for w in words if w not in ("cat", "a")]
    assert ADDED.decode(ids).split() == words


def test_flags_of_added_tokens() -> None:
    def added(text: str) -> list[str]:
        return [t for t in ADDED.convert_ids_to_tokens(encode_text(ADDED, text)) if t in ADDED.get_added_vocab()]

    assert added("azog zoga zog") == ["zog"]  # single_word
    assert encode_text(ADDED, "a  <s1>  cat") == encode_text(ADDED, "a<s1>cat")  # lstrip, rstrip
    assert added("x<a>b<a>") == ["<a>b", "<a>"]  # the longest one


# ---- the processor


def test_tensors_are_of_pytorch(processor: MMInterleavedProcessor) -> None:
    plain, asked = processor(DOCUMENT), processor(DOCUMENT, return_tensors="pt", padding=True)
    assert all(torch.equal(plain[name], asked[name]) for name in plain)
    for kind in ("np", "tf", "jax", "mlx"):
        with pytest.raises(ValueError, match=f"return_tensors must be 'pt', not '{kind}'"):
            processor(DOCUMENT, return_tensors=kind)
    for padding in (False, "max_length"):
        with pytest.raises(ValueError, match="padding must be True or 'longest'"):
            processor(DOCUMENT, padding=padding)
    with pytest.raises(ValueError, match=r"no argument 'trainning'\. Did you mean 'training'"):
        processor(DOCUMENT, trainning=True)
    with pytest.raises(ValueError, match=r"documents\[0\] must be a Document, not str; pass strings as text="):
        processor("A cat.")


def test_text_and_images(processor: MMInterleavedProcessor) -> None:
    """In the manner of transformers: one `<|image|>` for each image, images of any kind that `Image` takes."""
    image = make_image()
    pixels = torch.from_numpy(np.array(image))
    expected = processor(Document([Text("A cat."), Image(image), Text("asleep", attached=True)]))
    for images in (image, [image], [[image]], pixels.numpy(), pixels.permute(2, 0, 1), pixels.permute(2, 0, 1)[None]):
        found = processor(text="A cat.<|image|>asleep", images=images, return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"document 0, images\[1\]: an image must be a path"):
        processor(text="<|image|><|image|>", images=[image, b"junk"])
    with pytest.raises(ValueError, match="give either documents, or text"):
        processor(DOCUMENT, text="A cat.")
    with pytest.raises(ValueError, match="a text must be a string, not int"):
        processor(text=[3])


def conversation(question: str, image: object) -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]},
    ]


def test_chat_templates_give_batches(processor: MMInterleavedProcessor) -> None:
    messages = conversation("Who?", make_image())
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(messages, **chat)
    expected = processor(Document.from_messages(messages))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(processor.apply_chat_template(messages, **chat | {"return_dict": False}), expected.input_ids)

    several = [messages, conversation("What is it, and where?", make_image(1).copy())]
    found = processor.apply_chat_template(several, padding_side="left", **chat)
    expected = processor([Document.from_messages(m) for m in several], padding_side="left")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    texts = processor.apply_chat_template(several, add_generation_prompt=True)
    assert texts[0] == "Be brief. USER: <|image|>Who? ASSISTANT:"
    assert processor.apply_chat_template(messages) == "Be brief. USER: <|image|>Who? "


def test_chats_without_a_prompt_and_of_other_image_parts(processor: MMInterleavedProcessor, tmp_path: Path) -> None:
    make_image().save(tmp_path / "a.png")
    ended = [*conversation("Who?", make_image()), {"role": "assistant", "content": "A cat."}]
    ids = processor.apply_chat_template(ended, tokenize=True)
    assert ids[0, -1] == processor.tokenizer.eos_token_id
    with_prompt = processor.apply_chat_template(ended, tokenize=True, add_generation_prompt=True)
    assert torch.equal(with_prompt[:, : ids.shape[1]], ids)
    assert processor.tokenizer.decode(with_prompt[0, ids.shape[1] :]).strip() == "ASSISTANT:"
    for part in ({"type": "image", "path": str(tmp_path / "a.png")},
                 {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}):  # fmt: skip
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}]
        found = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert len(found["pixel_values"]) == 1
        assert processor.apply_chat_template(messages) == "USER: <|image|>Who? "


def test_what_is_wrong_in_a_conversation(processor: MMInterleavedProcessor) -> None:
    good, bad = conversation("Who?", make_image()), conversation("Who?", b"junk")
    with pytest.raises(
        ValueError, match=r"conversation 1, messages\[1\]\.content\[0\]\.image: an image must be a path"
    ):
        processor.apply_chat_template([good, bad], tokenize=True)
    with pytest.raises(ValueError, match="return_assistant_tokens_mask is not supported"):
        processor.apply_chat_template(good, tokenize=True, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="return_tensors must be 'pt'"):
        processor.apply_chat_template(good, tokenize=True, return_tensors="np")
    with pytest.raises(ValueError, match=r"kind of content 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}])


def test_words_of_users_are_no_control_tokens(processor: MMInterleavedProcessor) -> None:
    said = [{"role": "user", "content": "An <|image|> without an image, <s>5</s>."}]
    ids = processor.apply_chat_template(said, tokenize=True)[0]
    assert processor.image_token_id not in ids
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert "<|image|> without an image, <s>5</s>." in processor.decode(ids)


def test_decoding(processor: MMInterleavedProcessor) -> None:
    ids = processor([Document([Text("A cat.")]), Document([Text("A black dog.")])]).input_ids
    assert [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)] == ["A cat.", "A black dog."]
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == "A cat."
    assert processor.decode(ids[0]) == "<s>A cat.<pad>"
    ids = processor(Document([Text("A cat."), Image(make_image())]), training=True).input_ids[0]
    assert processor.decode(ids) == "<s>A cat.<|beginofimage|>" + "<|image|>" * 4 + "</s>"
    assert processor.post_process_image_text_to_text(ids[None]) == ["A cat."]


# ---- documentation


def test_the_examples_of_the_documentation(
    folder: Path, processor: MMInterleavedProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "transformers.md").read_text()
    make_image().save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    names = {"folder": folder, "image": make_image(), "Document": Document, "Text": Text, "Image": Image}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for line in re.split(r"(?<=# the same\n)|(?=^batch = processor\(Doc)", block, flags=re.MULTILINE):
            before = names.get("batch")
            exec(line, names)
            if line.rstrip().endswith("# the same"):
                assert all(torch.equal(names["batch"][key], before[key]) for key in before)
    assert names["model"].config.vocab_size == len(names["processor"].tokenizer) == 2052

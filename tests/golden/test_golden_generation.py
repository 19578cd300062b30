"""The cases of a golden folder that generate, by kind: texts, images, scores, and both in turn."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import PIL.Image
import pytest
import torch
from torch import Tensor

from mm_interleaved import MMInterleaved
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.generation import InterleavedGenerator, SegmentFinished
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.generation.text import end_tokens, write
from mm_interleaved.model.layout import find_images, previous_images
from mm_interleaved.processor import Batch
from mm_interleaved.processor.images import center_crop, to_pil
from mm_interleaved.processor.packing import TokenStream

from .golden_set import GoldenSet, from_original, kind, strided


@kind("texts")
def test_texts(golden: GoldenSet, case: str) -> None:
    x, model = golden.tensors(case), golden.model.eval()
    settings = from_original(**golden.cases[case]["params"]["kwargs"]).text
    batch, config = golden.batch(x), golden.config
    texts = [t for row in model.generate_text(batch, settings) for t in row]
    expected = x["out.text_ids"]
    if settings.num_beams > 1:
        every = model.generate_text(batch, replace(settings, num_return_sequences=settings.num_beams))
        closers = x["out.token_that_closed_hypothesis"].tolist()
        for index, (text, row, closer) in enumerate(zip(texts, expected, closers, strict=True)):
            # The original overwrites the closing token with </s>, so the set names it by the text's ids; a text that
            # two beams closed with different tokens stands in it with either.
            beams = every[index // settings.num_return_sequences]
            assert closer in {-1 if b.end is None else b.end for b in beams if b.ids == text.ids}
            ids = [config.bos_token_id, *text.ids, *([config.eos_token_id] if closer >= 0 else [])]
            assert ids == row[: len(ids)].tolist()
            assert (row[len(ids) :] == config.pad_token_id).all()
        logits = model.lm_head(model.prefill(batch).last).repeat_interleave(settings.num_beams, 0)
        golden.close(case, "first_step_logits", logits, x["out.first_step_logits"])
        return
    for text, row in zip(texts, expected, strict=True):
        ids = [config.bos_token_id, *text.all_ids]
        assert ids == row[: len(ids)].tolist()
        assert (row[len(ids) :] == config.pad_token_id).all()
    steps = list(write(model.prefill(batch), settings, [torch.Generator()] * len(texts)))
    active = torch.stack([s.active for s in steps], dim=1)
    logits = torch.stack([s.logits for s in steps], dim=1)
    golden.close(case, "step_logits", logits, x["out.step_logits"], active)


@kind("images")
def test_images(golden: GoldenSet, case: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    settings = from_original(**golden.cases[case]["params"]["kwargs"]).image
    settings = replace(settings, seed=golden.description["model"]["image_decoder_config"]["sd_base_seed"])
    batch = golden.batch(x)
    targets = x["in.target_image_idxs"].tolist() if "in.target_image_idxs" in x else None
    decoder = model.image_decoder
    steps, conditions, raw = [], [], []
    denoise = decoder.denoise

    def watched(given: Tensor, *arguments: object):
        conditions.append(given)
        for step in denoise(given, *arguments):
            steps.append(step)
            yield step

    decoder.denoise = watched  # looks at the steps of the public call
    hook = decoder.vae.decoder.register_forward_hook(lambda _m, _i, out: raw.append(out))
    try:
        images = model.generate_images(batch, settings, targets)
    finally:
        del decoder.denoise
        hook.remove()
    golden.close(case, "perceiver_output", conditions[0], x["out.perceiver_output"])
    per_run = len(steps) // settings.num_candidates
    golden.close(case, "timesteps", torch.tensor([s.timestep for s in steps[:per_run]]), x["out.timesteps"])
    predictions, latents = (torch.stack([getattr(s, k) for s in steps]) for k in ("prediction", "latents"))
    golden.close(case, "guided_noise_pred_per_step", predictions, x["out.guided_noise_pred_per_step"])
    golden.close(case, "latents_per_step", latents, x["out.latents_per_step"])
    golden.close(case, "image_strided", *strided(images, x["out.image_strided"]))
    golden.close_stats(case, "image_stats", images, x["out.image_stats"])
    name = "vae_decoded_preclamp_strided"
    golden.close(case, name, *strided(torch.cat(raw), x[f"out.{name}"]))
    if "out.image" in x:
        golden.close(case, "image", images, x["out.image"])
    positions = find_images(batch.input_ids, batch.attention_mask, config.soi_token_id, None)
    slots = previous_images(positions, 1)
    mask = (torch.cat([slots, slots.new_full((len(slots), 1), -1)], 1)[:, :1] >= 0).long()
    golden.close(case, "mmfs_mask_img", mask, x["out.mmfs_mask_img"])


@kind("scores")
def test_scores(golden: GoldenSet, case: str) -> None:
    x, model, config = golden.tensors(case), golden.model.eval(), golden.config
    scores = []
    for sample in range(golden.cases[case]["params"]["n_samples"]):
        ids, mask = x[f"in.text_ids_{sample}"][None], x[f"in.attention_mask_{sample}"][None]
        pixels = golden.pixels(x["in.image_idx"][sample : sample + 1])
        zero = torch.zeros(1, dtype=torch.long)
        batch = Batch(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), pixel_values=pixels,
            image_rows=zero, document_starts=zero,
        )  # fmt: skip
        options, lengths = x[f"in.options_ids_{sample}"], x[f"in.options_attn_masks_{sample}"].sum(1)
        chosen = [o[:n].tolist() for o, n in zip(options, lengths, strict=True)]
        scores.append(model.score(batch, [chosen]))
    assert int((x["in.text_ids_0"] == config.soi_token_id).sum()) == 1
    golden.close(case, "scores", torch.tensor(scores), x["out.scores"])


def _cropped(image: PIL.Image.Image, size: int) -> Tensor:
    """The central square, [3, size, size] in [0, 1]."""
    return torch.from_numpy(center_crop(image, size).transpose(2, 0, 1).astype("float32") / 255)


class _PixelsOnly:
    """Stands in for a processor where there are ids but no tokenizer."""

    def __init__(self, golden: GoldenSet) -> None:
        self.size = golden.config.vision_config.image_size
        self.pad = golden.config.pad_token_id
        self.first: Batch | None = None

    def pixels(self, images: list[PIL.Image.Image]) -> Tensor:
        found = [_cropped(p, self.size) for p in images]
        return torch.stack(found) if found else torch.zeros(0, 3, self.size, self.size)

    def decode_text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def collate(self, streams: list[TokenStream], padding_side: str) -> Batch:
        assert len(streams) == 1
        assert padding_side == "left"
        ids = torch.from_numpy(streams[0].ids)[None]
        zero = torch.zeros(1, dtype=torch.long)
        pixels = self.pixels([image.source for image in streams[0].images])
        return Batch(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None],
            pixel_values=pixels, image_rows=zero, document_starts=zero,
        )  # fmt: skip


def _pixels_equal(measured: Tensor, expected: Tensor) -> None:
    """8-bit images: a float error of 1e-6 may flip a rounding here and there."""
    difference = (measured.int() - expected.int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).float().mean() < 0.01


class _FromIds(InterleavedGenerator):
    """Goes on from ids instead of a document."""

    def __init__(self, model: MMInterleaved, processor: _PixelsOnly, settings: GenerationSettings, given: TokenStream):
        super().__init__(model, processor, settings)
        self.given = given

    def plan(self, document: Document) -> deque[TokenStream]:
        return deque([self.given])


def _generator(golden: GoldenSet, x: dict[str, Tensor], params: dict) -> _FromIds:
    settings = from_original(**params["kwargs"])
    seed = golden.description["model"]["image_decoder_config"]["sd_base_seed"]
    settings = replace(
        settings,
        image=replace(settings.image, seed=seed),
        max_turns=params["num_iter"],
        stop_at_eos=False,
        force_image=params["force_gen_image_next"],
    )
    ids = x["in.text_ids"][0]
    images = [Image(to_pil(p.numpy())) for p in golden.pixels(x["in.image_idx"])]
    given = TokenStream(ids.numpy(), (ids >= 0).numpy(), images)
    return _FromIds(golden.model.eval(), _PixelsOnly(golden), settings, given)


def _check_turn(
    golden: GoldenSet, case: str, x: dict[str, Tensor], event: SegmentFinished, force: bool, drawn: list[Tensor]
) -> bool:
    """Compare what a turn made; returns whether an image must follow."""
    generated = event.segment.generated
    config, turn = golden.config, f"iter{generated.turn}"
    if isinstance(event.segment, Text):
        assert [config.bos_token_id, *generated.ids] == x[f"out.{turn}_generated_ids"][0].tolist()
        end = generated.ids[-1]
        follows, stopped = force or end == config.soi_token_id, end == config.eos_token_id
        flags = f"{turn}_gen_image_next_and_stopped"
        golden.close(case, flags, torch.tensor([follows, stopped]), x[f"out.{flags}"])
        return follows
    golden.close(case, f"{turn}_image_strided", *strided(torch.cat(drawn), x[f"out.{turn}_image_strided"]))
    pixels = torch.stack([_cropped(image, image.width) * 255 for image in generated.candidates])
    _pixels_equal(pixels.round(), x[f"out.{turn}_image_u8"])
    shown = _PixelsOnly(golden).pixels(generated.candidates[:1])[0]
    _pixels_equal((shown * 255).round(), x[f"out.{turn}_new_image_tensor_u8"])
    drawn.clear()
    return False


@kind("inter")
def test_interleaved(golden: GoldenSet, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, config, params = golden.tensors(case), golden.config, golden.cases[case]["params"]
    generator = _generator(golden, x, params)
    decoder, drawn = generator.model.image_decoder, []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda latents: drawn.append(decode(latents)) or drawn[-1])
    placeholder = [config.soi_token_id] + [config.image_token_id] * config.num_image_tokens
    before, follows, turn = x["in.text_ids"][0].tolist(), False, 0
    for event in generator.run([Document()]):
        if not isinstance(event, SegmentFinished):
            continue
        assert event.segment.generated.turn == turn
        assert isinstance(event.segment, Image) == follows
        golden.close(case, f"iter{turn}_text_ids_in", torch.tensor([before]), x[f"out.iter{turn}_text_ids_in"])
        follows = _check_turn(golden, case, x, event, params["force_gen_image_next"], drawn)
        before = generator.rows[0].ids + placeholder * follows
        turn += 1
    assert turn == params["num_iter"]
    images = len(generator.rows[0].images) + follows
    assert before == x["out.final_text_ids"][0].tolist()
    assert [images] == x["out.final_num_image_per_seq"].tolist()
    assert [images - 1] == x["out.final_target_image_idxs"].tolist()
    assert end_tokens(generator.model) == [config.eos_token_id, config.soi_token_id]

"""The whole wiring of MM-Interleaved: tensors in, tensors out.

pixels ──► visual tokenizer ──► visual tokens ──┐ (into the text at the image tokens)
                │ pyramid                       ▼
                ├──────────── MMFS ──────► language model ──► text logits
                │                               │ hidden states up to <begin-of-image>, reversed
                └──────────── MMFS ──────► image decoder ──► picture
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.utils import ModelOutput

from ..ops import promote
from .config import MMInterleavedConfig
from .fused import linears
from .image_decoder import DiffusionDraws, ImageDecoder, LearnedTokens
from .kv_cache import KVCache
from .language_model import build_language_model, image_features, synchronizers
from .layout import ImagePositions, Layout, document_mask, plan, reversed_context
from .mmfs import VisibleImages
from .placement import compute_device
from .positions import PositionTable
from .resizing import ResizableVocabulary
from .synchronizer import ImageFeatures
from .unet import EarlierImages
from .visual_tokenizer import VisualFeatures, VisualTokenizer
from .weights import is_quantized


@dataclass
class MMInterleavedOutput(ModelOutput):
    """Result of `MMInterleaved.forward`.

    Attributes:
        loss: weighted sum of the losses that were computed; None without labels and without targets.
        loss_txt: mean cross-entropy over the labelled tokens.
        loss_img: mean squared error of the predicted noise.
        loss_kept: see `keep_conditions`.
        logits: [batch, length, vocab] in float32, on request.
        last_hidden_state: [batch, length, width] after the decoder's last norm.
    """

    loss: Tensor | None = None
    loss_txt: Tensor | None = None
    loss_img: Tensor | None = None
    loss_kept: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


def unit_range(pixels: Tensor) -> Tensor:
    """Pictures in [0, 1]: uint8 ones divided by 255, others as they are."""
    return pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels


class TextHead(nn.Module):
    """Text logits: a head over the whole vocabulary, plus trainable rows for the new tokens at its end."""

    def __init__(self, width: int, vocab_size: int, num_new: int) -> None:
        super().__init__()
        self.num_new = num_new
        self.head = nn.Linear(width, vocab_size)
        self.new = nn.Linear(width, num_new)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New tokens start at a logit of -100 + 95 = -5, so that a fresh model does not emit them."""
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.new.weight)
        nn.init.constant_(self.new.bias, 95.0)
        nn.init.constant_(self.head.bias[-self.num_new :], -100.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., vocab]."""
        logits, added = linears(hidden, (self.head, self.new))
        old, new = logits.split([logits.shape[-1] - self.num_new, self.num_new], dim=-1)
        return torch.cat([old, new + added], dim=-1)


class KeptConditions:
    """The conditions of drawings as a model said them at one time; no part of that model, of which it has a copy.

    Args:
        model: as it is now.
        weight: of the loss.
    """

    def __init__(self, model: MMInterleavedModel, weight: float) -> None:
        self.weight = weight
        decoder = model.image_decoder
        left_out = {id(part): nn.Identity() for part in (decoder.unet, decoder.vae)}  # by deepcopy's memo
        self.before = deepcopy(model, left_out).requires_grad_(False).eval()

    def loss(self, conditions: Tensor, row: tuple[Any, ...]) -> Tensor:
        """Weighted mean squared error of `conditions` [drawn, tokens, width], from the same inputs."""
        before = self.before.to(conditions.device)
        with torch.no_grad():
            wanted = before._conditions(before._read(*row)[0], row[-1])
        return self.weight * F.mse_loss(conditions.float(), wanted.float())


@dataclass
class Together:
    """For which losses every `forward` calls all that they need, whatever its batch holds; see `keep_together`."""

    text: bool
    image: bool


class MMInterleavedModel(ResizableVocabulary, PreTrainedModel):
    """Reads and writes rows of text and pictures, as tensors. `MMInterleaved` adds generation on top."""

    config_class = MMInterleavedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ("MMFSDecoderLayer", "ViTAdapter", "Resampler", "ResnetBlock", "UNetSynchronizer")
    _keep_in_fp32_modules_strict = ("image_decoder.vae",)
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: MMInterleavedConfig) -> None:
        super().__init__(config)
        width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        self.visual_tokenizer = VisualTokenizer(config)
        self.language_model = build_language_model(config)
        self.lm_head = TextHead(width, config.vocab_size, config.num_new_tokens)
        self.image_decoder = ImageDecoder(config.image_decoder, width, vision_width)
        self.context_proj = nn.Linear(width, width)
        self.context_positions = PositionTable.line(config.max_context_length, width)
        self.soi_token = LearnedTokens(1, width)
        self._kept: KeptConditions | None = None
        self._together = Together(text=False, image=False)
        self.set_mmfs_implementation(config.mmfs_implementation)
        self.post_init()
        for synchronizer in synchronizers(self.language_model):  # the decoder's own rule has just wiped theirs out
            synchronizer.mmfs.reset_parameters()
        self.freeze()

    def freeze(self) -> None:
        """Let gradients flow to everything but what `config.frozen` names."""
        frozen = [re.compile(pattern) for pattern in self.config.frozen]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(pattern.match(name) for pattern in frozen))

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing but the tables that checkpoints leave out: every part initialises itself when it is made."""
        if isinstance(module, PositionTable):
            module.reset_parameters()
        elif isinstance(module, CLIPVisionEmbeddings):
            with torch.no_grad():
                module.position_ids.copy_(torch.arange(module.num_positions)[None])

    @property
    def compute_device(self) -> torch.device:
        """Where inputs go: the device of the weights that are in memory, or where offloaded weights are brought."""
        return compute_device(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers, but weights must be safetensors, and complete.

        Raises:
            ValueError: a weight is missing or unexpected.
        """
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            keys = sorted(info[f"{kind}_keys"])
            if keys:
                raise ValueError(f"the checkpoint has {len(keys)} {kind} weights, among them {', '.join(keys[:3])}")
        model.freeze()  # loading makes new parameters
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As everywhere in transformers.

        Raises:
            ValueError: the weights are quantized, see `quantize`.
        """
        if is_quantized(self):
            raise ValueError("quantized weights cannot be saved; keep the checkpoint and quantize it when it is loaded")
        super().save_pretrained(*args, **kwargs)

    def set_mmfs_implementation(self, implementation: str) -> None:
        """Choose "fast" or "reference" for every synchronizer; both compute the same."""
        layers = [s.mmfs for s in synchronizers(self.language_model)]
        for mmfs in [*layers, *(s.mmfs for s in self.image_decoder.unet.synchronizers)]:
            mmfs.implementation = implementation

    def encode_images(self, pixel_values: Tensor) -> VisualFeatures:
        """Image tokens and maps of `pixel_values` [I, 3, image_size, image_size] in [0, 1], or uint8 in [0, 255]."""
        return self.visual_tokenizer(unit_range(pixel_values.to(self.compute_device)))

    @property
    def context_length(self) -> int:
        """Most tokens of a row: positions of the language model, and of what the image decoder reads."""
        return min(self.config.text_config.max_position_embeddings, self.config.max_context_length)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Text logits [..., vocabulary] of hidden states [..., D], float32 or better."""
        logits = self.lm_head(hidden)
        return logits.to(promote(logits.dtype))

    def check_image_tokens(self, input_ids: Tensor, images: int) -> None:
        """Refuse `input_ids` [B, L] that do not hold num_image_tokens image tokens for each of so many images.

        Raises:
            ValueError: they hold another number.
        """
        found, each = int((input_ids == self.config.image_token_id).sum()), self.config.num_image_tokens
        if found != images * each:
            raise ValueError(
                f"input_ids holds {found} image tokens, but {images} images need {images * each} ({each} each)"
            )

    def embed(self, input_ids: Tensor, image_tokens: Tensor | None, checked: bool = False) -> Tensor:
        """Token embeddings [batch, length, width], with pictures in place and `soi_token` added to every SOI.

        Args:
            input_ids: [batch, length].
            image_tokens: [pictures, num_image_tokens, width] in the order of their slots; None: no picture.
            checked: whether their slots are known to be there; more pictures may then follow, for which there are none.

        Raises:
            ValueError: the number of image slots is not num_image_tokens times the number of pictures.
        """
        embeds = self.language_model.embed_tokens(input_ids)
        is_soi = (input_ids == self.config.soi_token_id)[..., None]
        embeds = torch.where(is_soi, embeds + self.soi_token().to(embeds), embeds)
        if image_tokens is None:
            return embeds
        if not checked:
            self.check_image_tokens(input_ids, len(image_tokens))
        flat = image_tokens.flatten(0, 1).to(embeds)
        is_slot = input_ids == self.config.image_token_id
        if not len(flat):
            return embeds
        # Text reads a token as well, which is then not taken; each another one, or their gradients would queue up.
        number = is_slot.flatten().cumsum(0).view_as(input_ids) - 1
        anything = torch.arange(input_ids.numel(), device=embeds.device).view_as(input_ids) % len(flat)
        return torch.where(is_slot[..., None], flat[torch.where(is_slot, number, anything)], embeds)

    def decode(
        self,
        embeds: Tensor,
        images: ImageFeatures,
        visible: Tensor | VisibleImages,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Run the language model.

        Args:
            embeds: [B, L, D].
            images: what the synchronizers look at.
            visible: [B, L, slots] images that each token sees, most recent first, -1 = none.
            attention_mask: [B, past + L] 1 = real, or an additive mask [B, 1, L, L]; None: all real. A `KVCache` knows
                by itself which tokens are real.
            position_ids: [B, L]; None: counted from 0.
            past_key_values: a cache to read and extend; None: none.

        Returns:
            Hidden states after the last norm, [B, L, D].
        """
        if isinstance(visible, Tensor):
            visible = VisibleImages.build(visible.flatten(0, 1), len(images))
        if isinstance(past_key_values, KVCache):  # a mask of four axes keeps the library from making one
            attention_mask = embeds.new_zeros(1, 1, 1, 1)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            images=images,
            visible=visible,
        ).last_hidden_state

    def image_context(
        self, hidden: Tensor, positions: ImagePositions, longest: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the image decoder reads for each picture: its document up to the SOI, reversed (spec/model 5.1).

        Returns:
            [pictures, longest, width] projected and with positions counted back from the SOI, and the mask
            [pictures, longest].
        """
        context, mask = reversed_context(hidden, positions, longest)
        return self.project_context(context, mask), mask

    def project_context(self, context: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [pictures, longest, width], SOI first, ready for the image decoder.

        Raises:
            ValueError: a context is longer than the table of positions.
        """
        context = context.masked_fill(mask[..., None] == 0, 0)
        table = self.context_positions()
        if context.shape[1] > len(table):
            raise ValueError(
                f"the context of a picture has {context.shape[1]} tokens, but the model knows {len(table)} positions "
                "(max_context_length)"
            )
        projected = self.context_proj(context)
        return projected + table[: context.shape[1]].to(projected)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        image_loss_mask: Tensor | None = None,
        loss_text_weight: float | None = None,
        loss_image_weight: float | None = None,
        draws: DiffusionDraws | None = None,
        generator: torch.Generator | None = None,
        layout: Layout | None = None,
        return_logits: bool | None = None,
        **kwargs: object,
    ) -> MMInterleavedOutput:
        """Losses and logits of a batch. A loss whose weight is 0 is not computed.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, length], 0 at padding; None: no padding.
            position_ids: [batch, length]; None: 0, 1, 2, ...
            pixel_values: [pictures, 3, image_size, image_size] in [0, 1], or uint8 in [0, 255], in the order of their
                SOI tokens; with a `layout`, more may follow, which nothing sees (see `Layout.filled`).
            document_starts: [pictures] column of the `<s>` that opens each picture's document; None: its row's start.
            labels: [batch, length], the token expected at each position, -100 where none is (the shift is done here).
            target_pixel_values: [pictures, 3, decoder size, decoder size] likewise, what the image decoder shall draw.
            image_loss_mask: [pictures] weight of each picture in the image loss; None: all 1.
            loss_text_weight, loss_image_weight: override the configuration's.
            draws: the random numbers of the image loss, for every picture of `layout.drawn` once or several times;
                None: once, drawn from `generator`, or else from PyTorch's own.
            layout: what `plan` made of this batch, if that was done beforehand.
            return_logits: None: only when there is no loss to compute.

        Raises:
            ValueError: pictures and image tokens do not match.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        config = self.config
        known = layout is not None
        if layout is None:
            found = int((input_ids == config.soi_token_id).sum())
            given = 0 if pixel_values is None else len(pixel_values)
            if found != given:
                raise ValueError(f"input_ids holds {found} begin-of-image tokens, but there are {given} pictures")
            layout = self.plan(input_ids, attention_mask, document_starts, labels)
        together = self._together
        if (together.text or together.image) and (pixel_values is None or not len(pixel_values)):
            pixel_values, known = self._blank(config.vision_config.image_size), True  # nothing sees it
        row = (input_ids, attention_mask, position_ids, pixel_values, layout)
        hidden, features = self._read(*row, checked=known)

        text_weight = config.loss_text_weight if loss_text_weight is None else loss_text_weight
        image_weight = config.loss_image_weight if loss_image_weight is None else loss_image_weight
        loss_txt = loss_img = loss_kept = None
        idle = []  # what the batch does not need and is called all the same, in the same order on every process
        if labels is not None and text_weight:
            loss_txt = self._text_loss(hidden, layout)
        elif together.text:
            idle.append(self.lm_head(hidden[:1, :1]).float().mean())
        if target_pixel_values is not None and len(layout.drawn) and image_weight:
            draws = draws or self.image_decoder.draw(len(layout.drawn), generator)
            loss_img = self._image_loss(hidden, layout, features, target_pixel_values, image_loss_mask, draws)
        elif together.image:
            idle.append(self._idle_drawing(hidden, layout, features))
        if self._kept is not None and len(layout.drawn):
            loss_kept = self._kept.loss(self._conditions(hidden, layout), row)
        elif self._kept is not None and together.image:
            idle.append(self._conditions(hidden, self._first_token(layout)).float().mean())
        losses = ((text_weight, loss_txt), (image_weight, loss_img), (1.0, loss_kept), *((0.0, x) for x in idle))
        parts = [w * x for w, x in losses if x is not None]
        wants_logits = not parts if return_logits is None else return_logits
        logits = self.lm_head(hidden) if wants_logits else None
        return MMInterleavedOutput(
            loss=sum(parts) if parts else None,
            loss_txt=loss_txt,
            loss_img=loss_img,
            loss_kept=loss_kept,
            logits=logits.to(promote(logits.dtype)) if wants_logits else None,
            last_hidden_state=hidden,
        )

    def keep_conditions(self, weight: float) -> None:
        """Let `forward` add `loss_kept`: how far what drawings are told has moved from what it is now.

        For a language model that learns to read while an image decoder, elsewhere, learns from what this one said: Li
        and Hoiem 2016, "Learning without Forgetting", on conditions. Needs memory for a second language model.

        Args:
            weight: of that mean squared error in the loss.
        """
        self._kept = KeptConditions(self, weight)

    def keep_together(self, text: bool = True, image: bool = True) -> None:
        """Let every `forward` call all that these losses need, for results that stay the same.

        For weights that several processes hold together: all of them must ask for the same ones, in the same order.

        Args:
            text, image: whether any batch of any process has that loss.
        """
        self._together = Together(text, image)

    def _blank(self, side: int) -> Tensor:
        """One black picture, [1, 3, side, side]."""
        return torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.compute_device)

    def _idle_drawing(self, hidden: Tensor, layout: Layout, features: VisualFeatures) -> Tensor:
        """The loss of drawing a black picture out of a single token, which weighs nothing there either."""
        zeros = torch.zeros(self.image_decoder.latent_shape(1), device=hidden.device)
        draws = DiffusionDraws(zeros[:, 0, 0, 0], zeros, zeros, zeros[:, 0, 0, 0].long())
        targets = self._blank(self.config.image_decoder.image_size)
        return self._image_loss(hidden, self._first_token(layout), features, targets, None, draws)

    @staticmethod
    def _first_token(layout: Layout) -> Layout:
        """`layout` with the first token as the context of the only drawing, which looks at no picture."""
        first = layout.drawn.new_zeros(1)
        nothing = first.new_zeros(1, 0)
        return replace(
            layout, drawn=first, contexts=ImagePositions(first, first, first), conditioning=nothing[0],
            earlier=VisibleImages(nothing, nothing.view(0, 0)), context_length=1,
        )  # fmt: skip

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        pixel_values: Tensor | None,
        layout: Layout,
        checked: bool = True,
    ) -> tuple[Tensor, VisualFeatures | None]:
        """Hidden states [batch, length, width] of planned rows, and the features of their pictures."""
        features, memory = self._encode(pixel_values)
        embeds = self.embed(input_ids, features.tokens if features else None, checked=checked)
        mask = attention_mask if layout.padded else None
        if self.config.isolate_documents:
            mask = document_mask(input_ids, attention_mask, self.config.bos_token_id, embeds.dtype)
        return self.decode(embeds, memory, layout.visible, mask, position_ids), features

    def _conditions(self, hidden: Tensor, layout: Layout) -> Tensor:
        """What the image decoder is told of each drawn picture, [drawn, tokens, width]."""
        return self.image_decoder.resampler(*self.image_context(hidden, layout.contexts, layout.context_length))

    def _encode(self, pixel_values: Tensor | None) -> tuple[VisualFeatures | None, ImageFeatures]:
        """Features of the pictures, and an (empty, if there are none) memory of them."""
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
            return features, image_features(self.config, features.pyramid)
        return None, self.no_images()

    def no_images(self) -> ImageFeatures:
        """The memory of no picture at all."""
        return image_features(self.config, self.empty_pyramid())

    def empty_pyramid(self) -> list[Tensor]:
        """The maps of no picture at all."""
        width = self.config.vision_config.hidden_size
        shapes = [(0, width, side, side) for side in self.config.pyramid_sides]
        return [torch.zeros(shape, dtype=self.dtype, device=self.compute_device) for shape in shapes]

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        drawn: Tensor | None = None,
        repeats: int = 1,
        routes: bool = True,
    ) -> Layout:
        """The layout of a batch, for `forward`; see `layout.plan`. Done on the CPU, it spares a device all waiting."""
        return plan(
            input_ids,
            attention_mask,
            document_starts,
            bos_token_id=self.config.bos_token_id,
            soi_token_id=self.config.soi_token_id,
            previous=self.config.image_decoder.previous_images,
            labels=labels,
            drawn=drawn,
            repeats=repeats,
            routes=routes,
        )

    def _text_loss(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Cross-entropy over the labelled positions; 0, with a gradient of 0, if there are none."""
        logits = self.lm_head(hidden.flatten(0, 1)[layout.labelled])  # only where something is to be learned
        total = F.cross_entropy(logits.to(promote(logits.dtype)), layout.targets, reduction="sum")
        return total / (layout.targets != -100).sum().clamp(min=1)

    def _image_loss(
        self,
        hidden: Tensor,
        layout: Layout,
        features: VisualFeatures,
        targets: Tensor,
        image_loss_mask: Tensor | None,
        draws: DiffusionDraws,
    ) -> Tensor:
        drawn = layout.drawn
        context, mask = self.image_context(hidden, layout.contexts, layout.context_length)
        return self.image_decoder.loss(
            context,
            mask,
            EarlierImages.of([m[layout.conditioning] for m in features.pyramid], layout.earlier),
            unit_range(targets.to(self.compute_device)[drawn]),
            draws.to(self.compute_device),
            None if image_loss_mask is None else image_loss_mask[drawn],
            self.config.normalize_image_loss,
        )

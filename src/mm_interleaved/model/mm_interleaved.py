"""The model: how its parts are connected. It takes tensors and returns tensors.

pixels ──► visual tokenizer ──► image tokens ───┐ (into the text at the image tokens)
                │ feature pyramid               ▼
                ├──────────── MMFS ──────► language model ──► text logits
                │                               │ hidden states up to <begin-of-image>, reversed
                └──────────── MMFS ──────► image decoder ──► image

Axes: B rows of the batch, L tokens of a row, I images of the batch, T target images of the image loss, K slots for the
visible images of a token (most recent first, -1 = none), D width, h and w height and width of an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.utils import ModelOutput

from ..ops import promote
from .config import MMInterleavedConfig
from .image_decoder import ImageDecoder, LearnedTokens, NoiseSamples, divisor
from .kv_cache import KVCache
from .language_model import attention_window, build_language_model, image_features, synchronizers
from .layout import (
    ImagePositions,
    Layout,
    block_mask,
    plan,
    reversed_context,
    sample_positions,
    starts_of_blocks,
    visible_images,
)
from .mmfs import VisibleImages
from .placement import compute_device
from .positions import PositionTable
from .resizing import ResizableVocabulary
from .synchronizer import ImageFeatures
from .text_head import TextHead
from .unet import EarlierImages
from .visual_tokenizer import VisualFeatures, VisualTokenizer
from .weights import is_quantized


@dataclass
class MMInterleavedOutput(ModelOutput):
    """Result of `MMInterleavedModel.forward`.

    Attributes:
        loss: weighted sum of the losses that were computed; None without labels and without target images.
        loss_txt: cross-entropy of the labels; their mean or, with `num_items_in_batch`, the share of this batch.
        loss_img: squared error of the predicted noise; the mean over target images, or the share of this batch.
        logits: [B, L, vocabulary] in float32, on request.
        last_hidden_state: [B, L, D] after the language model's last norm.
        conditions: [T, tokens, width] conditioning tokens of each target image, on request.
        past_key_values: the KV cache, with `use_cache`.
    """

    loss: Tensor | None = None
    loss_txt: Tensor | None = None
    loss_img: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    conditions: Tensor | None = None
    past_key_values: Cache | None = None


@dataclass
class CachedImages:
    """The images of the rows of a KV cache; `forward` stores it as `cache.cached_images`.

    Attributes:
        features: features of the images.
        visible: [B, K] images that are visible to the next token of each row.
    """

    features: ImageFeatures
    visible: Tensor


def unit_range(pixels: Tensor) -> Tensor:
    """Images in [0, 1]: uint8 images are divided by 255, others are unchanged."""
    return pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels


class MMInterleavedModel(ResizableVocabulary, PreTrainedModel):
    """The network over rows of text and images. `MMInterleaved` adds generation.

    Arguments of `forward`; all but `input_ids` are optional:
        input_ids: [B, L].
        attention_mask: [B, L], or [B, columns of the cache + L], 0 at padding; None: no padding.
        position_ids: [B, L]; None: counted from the columns of the cache, or from 0 in each row or sample.
        pixel_values: [I, 3, h, w] in [0, 1], or uint8 in [0, 255], in the order of their SOI tokens; with a `layout`,
            more images may follow, which are visible to no token (see `Layout.filled`).
        document_starts: [I] column of the `<s>` that starts each image's document; None: the start of its row.
        image_rows: [I] the row of each image; only compared with `input_ids`.
        sample_ids: [B, L] number of each token's sample, -1 at padding: tokens attend to their own sample only, also
            to its images, and positions restart with it. None: a row is a sample. Not with a cache.
        labels: [B, L] the token expected at each position, -100 where none is (the shift is done here).
        target_pixel_values: [I, 3, h, w] in the same ranges, the targets of the image decoder.
        image_loss_mask: [I] weight of each image in the image loss; None: all 1.
        loss_text_weight, loss_image_weight: weights that replace the configuration's.
        num_items_in_batch: labels of all micro-batches of an optimizer step, as transformers' Trainer counts them. The
            text loss is then the sum over this micro-batch divided by that count, so that the micro-batches add up to
            the loss of the whole batch. None: the mean over this micro-batch.
        num_images_in_batch: target images of all micro-batches. The image loss is then the sum over this micro-batch
            divided by that count. None, with `num_items_in_batch`: the mean of this micro-batch times its share of the
            labels. The sum of the micro-batches is then the mean of the whole batch if their shares of images and of
            labels agree, for instance if all have as many of both; `training.counting.CountingTrainer` counts images
            for all other batches.
        noise_samples: random numbers of the image loss, for all of `layout.target_images` once or several times; None:
            sampled once, from `generator`, or else from PyTorch's global generator.
        layout: the result of `plan` for this batch, if it was computed before; nothing is checked then.
        return_logits: whether to return logits; None: only if there is no loss to compute.
        return_conditions: whether to return the conditioning tokens of the image decoder.
        logits_to_keep: number of last tokens, or indices of tokens, whose logits are returned; 0: all.
        past_key_values, use_cache: a KV cache of transformers that is read and extended. It also stores the visible
            images of its rows, so only the call that fills it takes images.
        inputs_embeds, output_attentions, output_hidden_states, return_dict: arguments of other models; only None, or
            the equivalent value, is supported.
    """

    config: MMInterleavedConfig
    config_class = MMInterleavedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ("MMFSDecoderLayer", "ViTAdapter", "Resampler", "ResnetBlock", "UNetSynchronizer")  # pyright: ignore[reportAssignmentType]  # a tuple serves as well
    _keep_in_fp32_modules_strict = ("image_decoder.vae",)  # pyright: ignore[reportAssignmentType]  # likewise
    _skip_keys_device_placement = ("past_key_values",)  # pyright: ignore[reportAssignmentType]  # likewise
    accepts_loss_kwargs = True  # transformers' Trainer may pass `num_items_in_batch`

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
        self.generation_config = GenerationConfig.from_model_config(config)  # PEFT expects it
        self.set_mmfs_implementation(config.mmfs_implementation)
        self.post_init()
        for synchronizer in synchronizers(self.language_model):  # the decoder's generic initialisation overwrote these
            synchronizer.mmfs.reset_parameters()
        self.freeze()

    if TYPE_CHECKING:  # the library's annotation of its wrapped method lacks `self`

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class uses transformers' generation loop; `MMInterleaved` has its own."""
        return issubclass(cls, GenerationMixin)

    def freeze(self) -> None:
        """Set `requires_grad` of all parameters: False for those that `config.frozen` names."""
        frozen = [re.compile(pattern) for pattern in self.config.frozen]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(pattern.match(name) for pattern in frozen))

    def _init_weights(self, module: nn.Module) -> None:
        """Fill the tables that checkpoints do not contain. All other parts initialise themselves when they are made."""
        if isinstance(module, PositionTable):
            module.reset_parameters()
        elif isinstance(module, CLIPVisionEmbeddings):
            with torch.no_grad():
                module.position_ids.copy_(torch.arange(module.num_positions)[None])

    @property
    def compute_device(self) -> torch.device:
        """The device of inputs: that of the weights in memory, or the one that offloaded weights are moved to."""
        return compute_device(self)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers, but weights must be safetensors, and complete.

        Raises:
            ValueError: a weight is missing, unexpected or of another shape.
        """
        kwargs.setdefault("use_safetensors", True)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = True  # transformers' own error does not name the weight
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for kind in ("missing", "unexpected"):
            keys = sorted(info[f"{kind}_keys"])
            if keys:
                raise ValueError(f"the checkpoint has {len(keys)} {kind} weights, among them {', '.join(keys[:3])}")
        if info["mismatched_keys"] and not may_differ:
            name, found, wanted = sorted(info["mismatched_keys"])[0]
            raise ValueError(f"the checkpoint has {len(info['mismatched_keys'])} weights of another shape, among them "
                             f"{name}: {list(found)} instead of {list(wanted)}")  # fmt: skip
        if not model._hf_peft_config_loaded:  # an adapter has its own frozen parameters
            model.freeze()  # loading makes new parameters
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As everywhere in transformers; with an adapter, only that is written.

        Raises:
            ValueError: the weights are quantized, see `quantize`.
        """
        if is_quantized(self) and not self._hf_peft_config_loaded:
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
        """Most tokens of a row: limited by the language model's positions and by the context of the image decoder."""
        return min(self.config.text_config.max_position_embeddings, self.config.max_context_length)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Text logits [..., vocabulary] of hidden states [..., D], float32 or better."""
        logits = self.lm_head(hidden)
        return logits.to(promote(logits.dtype))

    def check_image_tokens(self, input_ids: Tensor, images: int) -> None:
        """Check that `input_ids` [B, L] hold num_image_tokens image tokens for each of so many images.

        Raises:
            ValueError: they hold another number.
        """
        found, each = int((input_ids == self.config.image_token_id).sum()), self.config.num_image_tokens
        if found != images * each:
            raise ValueError(
                f"input_ids holds {found} image tokens, but {images} images need {images * each} ({each} each)"
            )

    def embed(self, input_ids: Tensor, image_tokens: Tensor | None, checked: bool = False) -> Tensor:
        """Token embeddings [B, L, D], with image tokens in their places and `soi_token` added to every SOI.

        Args:
            input_ids: [B, L].
            image_tokens: [I, num_image_tokens, D] in the order of their places; None: no image.
            checked: whether the number of places was checked before; then more images than places are allowed.

        Raises:
            ValueError: the number of image tokens in `input_ids` is not num_image_tokens times the number of images.
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
        # Text positions gather an image token too, which `where` discards. They gather different ones, because the
        # gradients of a single entry would be added up one after the other.
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
            images: features of the images.
            visible: [B, L, K] visible images of each token, most recent first, -1 = none.
            attention_mask: [B, past + L] 1 = real, or an additive mask [B, 1, L, L]; None: all real. A `KVCache` needs
                none.
            position_ids: [B, L]; None: counted from 0.
            past_key_values: a cache to read and extend; None: none.

        Returns:
            Hidden states after the last norm, [B, L, D].
        """
        if isinstance(visible, Tensor):
            visible = VisibleImages.build(visible.flatten(0, 1), len(images))
        if isinstance(past_key_values, KVCache):  # with a mask of four axes the library makes none
            attention_mask = embeds.new_zeros(1, 1, 1, 1)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=False,  # otherwise the library would make a cache
            images=images,
            visible=visible,
        ).last_hidden_state

    def _encode(self, pixel_values: Tensor | None) -> tuple[VisualFeatures | None, ImageFeatures]:
        """Features of the images (None: no image), and the levels of them that the language model attends to."""
        if pixel_values is not None and len(pixel_values):
            features = self.encode_images(pixel_values)
            return features, image_features(self.config, features.pyramid)
        return None, self.no_images()

    def no_images(self) -> ImageFeatures:
        """`ImageFeatures` of zero images."""
        return image_features(self.config, self.empty_pyramid())

    def empty_pyramid(self) -> list[Tensor]:
        """Maps of zero images."""
        width = self.config.vision_config.hidden_size
        shapes = [(0, width, side, side) for side in self.config.pyramid_sides]
        return [torch.zeros(shape, dtype=self.dtype, device=self.compute_device) for shape in shapes]

    def image_context(
        self, hidden: Tensor, positions: ImagePositions, longest: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context of each image: the hidden states of its document up to the SOI, reversed.

        Returns:
            [I, longest, D] projected and with positions counted back from the SOI, and the mask [I, longest].
        """
        context, mask = reversed_context(hidden, positions, longest)
        return self.project_context(context, mask), mask

    def project_context(self, context: Tensor, mask: Tensor) -> Tensor:
        """Project hidden states [I, longest, D], SOI first, and add positions, for the image decoder.

        Raises:
            ValueError: a context is longer than the table of positions.
        """
        context = context.masked_fill(mask[..., None] == 0, 0)
        table = self.context_positions()
        if context.shape[1] > len(table):
            raise ValueError(
                f"the context of an image has {context.shape[1]} tokens, but the model has {len(table)} positions "
                "(max_context_length)"
            )
        projected = self.context_proj(context)
        return projected + table[: context.shape[1]].to(projected)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        document_starts: Tensor | None = None, image_rows: Tensor | None = None, sample_ids: Tensor | None = None,
        labels: Tensor | None = None, target_pixel_values: Tensor | None = None, image_loss_mask: Tensor | None = None,
        loss_text_weight: float | None = None, loss_image_weight: float | None = None,
        num_items_in_batch: Tensor | int | None = None, num_images_in_batch: Tensor | float | None = None,
        noise_samples: NoiseSamples | None = None, generator: torch.Generator | None = None,
        layout: Layout | None = None, return_logits: bool | None = None, return_conditions: bool = False,
        logits_to_keep: int | Tensor = 0, past_key_values: Cache | None = None, use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> MMInterleavedOutput:  # fmt: skip
        """Losses, logits and hidden states of a batch; for the arguments see the class.

        A loss whose weight is 0 is not computed.

        Raises:
            ValueError: images and image tokens do not match, or an argument is not supported.
        """
        _refuse_unsupported(
            input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states, return_dict
        )
        assert input_ids is not None  # or it was refused
        cache = self._cache(past_key_values, use_cache, input_ids, sample_ids)
        past = _columns(cache)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        planned = layout is not None
        if layout is None:
            per_image = (pixel_values, target_pixel_values, image_loss_mask, image_rows)
            layout = self._plan_checked(
                input_ids, attention_mask[:, past:], document_starts, labels, sample_ids, *per_image
            )

        features, images = self._encode_for(pixel_values, cache)
        embeds = self.embed(input_ids, features.tokens if features else None, checked=planned)
        if sample_ids is not None and position_ids is None:
            position_ids = sample_positions(sample_ids)
        visible = self._visible_images(input_ids, layout, cache)
        mask = self._mask(input_ids, attention_mask, layout, embeds.dtype, past, sample_ids)
        hidden = self.decode(embeds, images, visible, mask, position_ids, cache)
        if cache is not None:
            self._keep_cached_images(cache, input_ids, attention_mask[:, past:], images)

        text_weight = self.config.loss_text_weight if loss_text_weight is None else loss_text_weight
        image_weight = self.config.loss_image_weight if loss_image_weight is None else loss_image_weight
        loss_txt = loss_img = None
        if layout.label_ids is not None and text_weight:
            loss_txt = self._text_loss(hidden, layout, num_items_in_batch)
        if target_pixel_values is not None and len(layout.target_images) and image_weight:
            noise_samples = noise_samples or self.image_decoder.sample_noise(len(layout.target_images), generator)
            assert features is not None  # target images are among the encoded ones
            loss_img = self._image_loss(
                hidden, layout, features, target_pixel_values, image_loss_mask, noise_samples, num_images_in_batch
            )
            if num_images_in_batch is None and num_items_in_batch is not None:
                loss_img = _share_of_labels(layout, num_items_in_batch) * loss_img
        losses = [w * x for w, x in ((text_weight, loss_txt), (image_weight, loss_img)) if x is not None]
        wants_logits = not losses if return_logits is None else return_logits
        return MMInterleavedOutput(
            loss=sum(losses[1:], start=losses[0]) if losses else None,
            loss_txt=loss_txt,
            loss_img=loss_img,
            logits=self._logits(hidden, logits_to_keep) if wants_logits else None,
            last_hidden_state=hidden,
            conditions=self.conditions_of(hidden, layout) if return_conditions else None,
            past_key_values=cache,
        )

    # ---- plan

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        target_images: Tensor | None = None,
        repeats: int = 1,
        routes: bool = True,
        sample_ids: Tensor | None = None,
    ) -> Layout:
        """The layout of a batch, for `forward`; see `layout.plan`. On the CPU it needs no device synchronisation."""
        return plan(
            input_ids,
            attention_mask,
            document_starts,
            bos_token_id=self.config.bos_token_id,
            soi_token_id=self.config.soi_token_id,
            previous=self.config.image_decoder.previous_images,
            labels=labels,
            target_images=target_images,
            repeats=repeats,
            routes=routes,
            sample_ids=sample_ids,
        )

    def _plan_checked(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        document_starts: Tensor | None,
        labels: Tensor | None,
        sample_ids: Tensor | None,
        pixel_values: Tensor | None,
        target_pixel_values: Tensor | None,
        image_loss_mask: Tensor | None,
        image_rows: Tensor | None,
    ) -> Layout:
        """The layout of a batch, after checks that its parts fit together; arguments as in `forward`.

        Raises:
            ValueError: two parts have different numbers of entries.
        """
        rows = (input_ids == self.config.soi_token_id).nonzero()[:, 0]
        given = 0 if pixel_values is None else len(pixel_values)
        if len(rows) != given:
            raise ValueError(f"input_ids holds {len(rows)} begin-of-image tokens, but there are {given} images")
        per_image = {"target_pixel_values": target_pixel_values, "image_loss_mask": image_loss_mask}
        for name, value in per_image.items():
            if value is not None and len(value) != given:
                raise ValueError(f"{name} has {len(value)} entries for {given} images")
        if image_rows is not None and image_rows.tolist() != rows.tolist():
            raise ValueError(f"image_rows is {image_rows.tolist()}, but input_ids has images in rows {rows.tolist()}")
        for name, value in {
            "attention_mask, after the columns of the cache,": attention_mask,
            "labels": labels,
            "sample_ids": sample_ids,
        }.items():
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} is {list(value.shape)}, but input_ids is {list(input_ids.shape)}")
        return self.plan(input_ids, attention_mask, document_starts, labels, sample_ids=sample_ids)

    # ---- encode

    def _encode_for(
        self, pixel_values: Tensor | None, cache: Cache | None
    ) -> tuple[VisualFeatures | None, ImageFeatures]:
        """As `_encode`; for a cache that stores images, those images.

        Raises:
            ValueError: there are further images for a cache that stores some.
        """
        seen: CachedImages | None = getattr(cache, "cached_images", None)
        if seen is None:
            features, images = self._encode(pixel_values)
            if cache is not None and not torch.is_grad_enabled():  # project once for all calls with this cache
                images.values = [s.project(images.features) for s in synchronizers(self.language_model)]
            return features, images
        if pixel_values is not None and len(pixel_values):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} images, but only the call that fills past_key_values takes "
                "images; leave them out, or let `generate_interleaved` add images to a document"
            )
        return None, seen.features

    # ---- language model

    def _cache(
        self, past_key_values: Cache | None, use_cache: bool | None, input_ids: Tensor, sample_ids: Tensor | None
    ) -> Cache | None:
        """The cache to read and extend; None: none.

        Raises:
            ValueError: samples or documents of one row must not attend to each other, and a cache cannot separate them.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config.text_config)
        if past_key_values is not None and sample_ids is not None:
            raise ValueError("sample_ids cannot be used with a cache; put one sample into each row and leave them out")
        if past_key_values is not None and self.config.isolate_documents:
            documents = (input_ids == self.config.bos_token_id).sum(1) + (_columns(past_key_values) > 0)
            if int(documents.max()) > 1:
                raise ValueError("with isolate_documents a cache takes one document a row; put others into other rows")
        return past_key_values

    def _mask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        layout: Layout,
        dtype: torch.dtype,
        past: int,
        sample_ids: Tensor | None,
    ) -> Tensor | None:
        """The attention mask of tokens [B, L] after `past` columns: 2D, additive 4D, or None."""
        isolated = self.config.bos_token_id if self.config.isolate_documents else None
        if (isolated is not None or sample_ids is not None) and not past:
            window = attention_window(self.config.text_config, input_ids.shape[1])
            return block_mask(starts_of_blocks(input_ids, isolated, sample_ids), attention_mask, dtype, window)
        return attention_mask if past or layout.padded else None

    def _visible_images(self, input_ids: Tensor, layout: Layout, cache: Cache | None) -> VisibleImages | Tensor:
        """The visible images of each token: the layout's, or [B, L, K] from those stored with the cache.

        Raises:
            ValueError: the cache has another number of rows.
        """
        seen: CachedImages | None = getattr(cache, "cached_images", None)
        if seen is None:
            return layout.visible
        if len(seen.visible) != len(input_ids):
            raise ValueError(f"past_key_values has {len(seen.visible)} rows, but input_ids has {len(input_ids)}")
        restarted = (input_ids == self.config.bos_token_id).cumsum(1) > 0  # images of earlier documents are invisible
        return torch.where(restarted[..., None], -1, seen.visible[:, None])

    def _keep_cached_images(
        self, cache: Cache, input_ids: Tensor, attention_mask: Tensor, images: ImageFeatures
    ) -> None:
        """Store with a cache the visible images of each row's next token; tokens and mask [B, L] are the latest."""
        seen: CachedImages | None = getattr(cache, "cached_images", None)
        if seen is not None:
            restarted = (input_ids == self.config.bos_token_id).any(1)
            visible = torch.where(restarted[:, None], -1, seen.visible)
        else:
            ids = F.pad(input_ids, (0, 1), value=self.config.image_token_id)  # the next token, whichever it is
            mask = F.pad(attention_mask, (0, 1), value=1)
            visible = visible_images(ids, mask, self.config.bos_token_id, self.config.soi_token_id)[:, -1]
        # an attribute of any class of cache; `getattr` reads it
        cache.cached_images = CachedImages(images, visible)  # pyright: ignore[reportAttributeAccessIssue]

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        """Logits [B, L or number kept, vocabulary] in float32 or better."""
        return self.compute_logits(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep])

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool = False,
        next_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for a step of a generation loop of transformers or PEFT.

        Args:
            input_ids: [B, L] all tokens so far.
            past_key_values: the cache; it may hold the first of them.
            attention_mask: [B, L] of all of them.
            position_ids: [B, L]; None: from `attention_mask`.
            is_first_iteration, next_sequence_length: ignored; the cache determines both here.
            **kwargs: further arguments of `forward`.
        """
        past = _columns(past_key_values)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if past:
            kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_PROMPT}
        new = input_ids.shape[1] - past
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids[:, position_ids.shape[1] - new :],
            **kwargs,
        }

    # ---- losses

    def conditions_of(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Conditioning tokens [T, tokens, width] of each target image; `hidden` is [B, L, D]."""
        return self.image_decoder.resampler(*self.image_context(hidden, layout.target_positions, layout.context_length))

    def _text_loss(self, hidden: Tensor, layout: Layout, num_items: Tensor | int | None) -> Tensor:
        """Cross-entropy of the labels divided by `num_items`, or their mean; 0 with a graph if there are no labels."""
        assert layout.label_ids is not None
        assert layout.label_positions is not None
        logits = self.compute_logits(hidden.flatten(0, 1)[layout.label_positions])  # only where something is learned
        total = F.cross_entropy(logits, layout.label_ids, reduction="sum")
        return total / divisor(_num_labels(layout) if num_items is None else num_items, total.device)

    def _image_loss(
        self,
        hidden: Tensor,
        layout: Layout,
        features: VisualFeatures,
        targets: Tensor,
        image_loss_mask: Tensor | None,
        noise_samples: NoiseSamples,
        count: Tensor | float | None,
    ) -> Tensor:
        """Squared error of the predicted noise, the sum divided by `count` or the mean; arguments as in `forward`."""
        images = layout.target_images
        context, mask = self.image_context(hidden, layout.target_positions, layout.context_length)
        return self.image_decoder.loss(
            context,
            mask,
            EarlierImages.of([m[layout.conditioning_images] for m in features.pyramid], layout.earlier),
            unit_range(targets.to(self.compute_device)[images]),
            noise_samples.to(self.compute_device),
            None if image_loss_mask is None else image_loss_mask[images],
            self.config.normalize_image_loss,
            count,
        )


_OF_THE_PROMPT = frozenset({"pixel_values", "document_starts", "image_rows", "layout"})  # for the first step only


def _columns(cache: Cache | None) -> int:
    """The number of columns in use of a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def _refuse_unsupported(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
) -> None:
    """Check for arguments that other models of transformers support and this one does not.

    Raises:
        ValueError: says what is not supported and what to do.
    """
    if inputs_embeds is not None:
        raise ValueError("inputs_embeds is not supported, because images are found by their token ids; pass input_ids")
    if input_ids is None:
        raise ValueError("input_ids is missing; the processor makes it, with the other arguments")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, length], not of shape {list(attention_mask.shape)}")
    if output_attentions:
        raise ValueError("output_attentions is not supported; leave it out")
    if output_hidden_states:
        raise ValueError("output_hidden_states is not supported; leave it out and take last_hidden_state")
    if return_dict is not None and not return_dict:
        raise ValueError("return_dict=False is not supported; leave it out and call to_tuple() on the output")


def _num_labels(layout: Layout) -> Tensor:
    return (layout.label_ids != -100).sum()


def _share_of_labels(layout: Layout, num_items: Tensor | int) -> Tensor:
    """This micro-batch's share of the labels of an optimizer step.

    Raises:
        ValueError: this micro-batch has no labels.
    """
    if layout.label_positions is None or not len(layout.label_positions):
        raise ValueError(
            "num_items_in_batch counts labels, and this batch has images to learn but no label. Pass "
            "num_images_in_batch as well (`mm_interleaved.training.counting.CountingTrainer` does)"
        )
    return _num_labels(layout) / num_items

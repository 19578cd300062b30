"""What a training run is: one tree of typed settings, read from YAML by `load_config`."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..data.config import DataConfig
from ..evaluation.config import TaskSuite
from ..validation import Count, Decay, NonNegativeFloat, Positive, PositiveFloat, Seed, Share, settings

Precision = Literal["float32", "bfloat16", "float16"]


FRESH = "fresh"


class TrainingError(RuntimeError):
    """Training cannot go on; says why, and what was written about it."""


@settings
class GroupConfig:
    """Parameters whose name contains `pattern` (a regular expression); None: the optimizer's own value."""

    pattern: str
    lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None


@settings
class MuonConfig:
    """Muon, for weights of linear layers and convolutions; AdamW takes the rest and what `plain` names."""

    scale: PositiveFloat = (
        0.2  # root mean square of an update's numbers, in learning rates; AdamW's are about 0.2 to 0.4
    )
    momentum: Decay = 0.95
    # Regular expressions: what comes first and last, and what points somewhere.
    plain: list[str] = field(
        default_factory=lambda: ["lm_head", "conv_in", "conv_out", "offset", "attention_weights", "patch_embedding"]
    )


@settings
class OptimizerConfig:
    """Biases and LayerNorms do not decay, nor does what `no_decay` (regular expressions) names."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.995])
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.05
    max_grad_norm: NonNegativeFloat = 1.0  # 0: no clipping
    groups: list[GroupConfig] = field(default_factory=list)  # the first that fits decides
    no_decay: list[str] = field(default_factory=list)
    muon: MuonConfig = field(default_factory=MuonConfig)


@settings
class ScheduleConfig:
    """Learning rate over time, as a share of each group's rate."""

    kind: Literal["cosine", "constant", "linear"] = "cosine"  # after the warm-up
    warmup_steps: Count = 0  # rises linearly from 0
    min_share: Share = 0.0  # cosine ends here


@settings
class EMAConfig:
    """An exponential moving average of the weights; what a run hands over at its end, and what it evaluates."""

    decay: Decay = 0.0  # 0: off
    start_step: Count = 0


@settings
class DDPConfig:
    """Data-parallel training under torchrun."""

    find_unused_parameters: bool = True
    static_graph: bool = False  # every step uses the same parameters; faster, and then nothing has to be found
    bucket_cap_mb: Positive = 25


@settings
class RunConfig:
    """What every training run has, whatever it trains.

    Attributes:
        output: folder of the run: `config.yaml`, `log.jsonl`, TensorBoard files, `checkpoint-N`, `final`.
        steps: optimizer steps.
        seed: seed of the initialisation and of every draw.
        accumulation: batches for each step.
        precision: type in which matrices are multiplied. Trainable weights are always kept in float32.
        compile: "regional" compiles the blocks that repeat, "decoder" only the layers of the language model.
        log_every, save_every, eval_every, sample_every: steps between two of each; 0: never.
        keep_checkpoints: how many of the newest stay.
        resume: "auto" (go on from the newest whole checkpoint, if there is one), "never", or a checkpoint folder.
        deepspeed: path of a DeepSpeed configuration, which then rules data parallelism; needs torchrun.
        fsdp: settings of transformers' `fsdp_config` (`{"fsdp_version": 2, ...}`); needs torchrun and accelerators.
        gradient_checkpointing: compute activations anew in the backward pass; a third more arithmetic, far less memory.
        selective_checkpointing: keep some of them after all, see `enable_checkpointing`.
        peak_tflops: of one device, for the MFU; None: known for common devices, else not shown.
        tensorboard: write TensorBoard files.
    """

    output: str
    steps: Positive
    seed: Seed = 0
    accumulation: Positive = 1
    precision: Precision = "bfloat16"
    compile: Literal["none", "regional", "decoder"] = "none"
    log_every: Positive = 10
    save_every: Count = 1000
    eval_every: Count = 0
    sample_every: Count = 0
    keep_checkpoints: Positive = 5
    resume: str = "auto"
    tf32: bool = True
    gradient_checkpointing: bool = False
    selective_checkpointing: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    deepspeed: str | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    peak_tflops: PositiveFloat | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.deepspeed and self.fsdp:
            raise ValueError("give 'deepspeed' or 'fsdp', not both")
        if self.ema.decay and (self.deepspeed or self.fsdp):
            raise ValueError("'ema.decay' keeps whole weights, which 'deepspeed' and 'fsdp' do not; set it to 0")
        if self.optimizer.kind == "muon" and (self.deepspeed or self.fsdp):
            raise ValueError(
                "'optimizer.kind: muon' needs whole matrices, which 'deepspeed' and 'fsdp' split; take adamw"
            )
        if self.sample_every and self.fsdp:
            raise ValueError("'sample_every' draws on one process, which has only a part of the weights with 'fsdp'")


@settings
class ComponentsConfig:
    """Folders of base models; see `mmi assemble`."""

    llm: str
    clip: str
    diffusion: str


@settings
class MMFSSwitches:
    """Which parts of the model look at images through synchronizers."""

    llm: bool = True
    unet: bool = True


@settings
class InitConfig:
    """Where a model's weights come from: exactly one of three.

    Attributes:
        preset: `release`, `small` or `debug`, with fresh weights.
        checkpoint: folder of a model to go on from (weights only; to go on with a run, see `resume`).
        components: base models to build on.
    """

    preset: str | None = None
    checkpoint: str | None = None
    components: ComponentsConfig | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("preset", "checkpoint", "components") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of preset, checkpoint and components, not {' and '.join(given) or 'none'}"
            )


@settings
class WeightsConfig:
    """Parameters that come from elsewhere than the rest of the model.

    Attributes:
        source: `from` in files. Folder of a model, of a part of one (as `mmi toyworld train-vision` writes it) or of a
            diffusers VAE, whose sizes the image decoder takes over; or `fresh`, for initial values.
        parameters: regular expression that is searched for in the names of the model's parameters; None: all that the
            folder holds.
    """

    source: Annotated[str, Field(alias="from")]
    parameters: str | None = None

    def __post_init__(self) -> None:
        if self.source == FRESH and self.parameters is None:
            raise ValueError("from: fresh needs parameters, a regular expression of their names")
        try:
            re.compile(self.parameters or "")
        except re.error as error:
            raise ValueError(f"parameters '{self.parameters}' is not a regular expression: {error}") from None


@settings
class ModelConfig:
    """The model that a run trains.

    Attributes:
        init_from: where its weights come from.
        weights: which of them come from elsewhere. No parameter may be named twice, so the order does not matter.
        tokenizer: folder or SentencePiece file; None: the checkpoint's or language model's own, or the one that ships.
        mmfs: which synchronizers there are.
        overrides: values of the model's configuration, nested as there.
    """

    init_from: InitConfig
    weights: list[WeightsConfig] = field(default_factory=list)
    tokenizer: str | None = None
    mmfs: MMFSSwitches = field(default_factory=MMFSSwitches)
    overrides: dict[str, Any] = field(default_factory=dict)

    RENAMED: ClassVar[dict[str, str]] = {
        **{name: f"It is now 'init_from.{name}'" for name in ("preset", "checkpoint", "components")},
        **dict.fromkeys(("vae", "vision", "language"), "It is now an entry of 'weights': {from: FOLDER}"),
        "unet": "It is now an entry of 'weights': {from: FOLDER, parameters: '^image_decoder\\.unet\\.'}",
        "fresh": "It is now an entry of 'weights': {from: fresh, parameters: PATTERN}",
    }

    def __post_init__(self) -> None:
        if any(entry.source == FRESH for entry in self.weights) and self.init_from.checkpoint is None:
            raise ValueError("from: fresh names what is not taken from a checkpoint; give init_from.checkpoint")


@settings
class LossConfig:
    """Weights of the two losses and how images enter.

    Attributes:
        text, image: weights (release: 1 and 10).
        image_fraction: share of a batch's images that the image decoder learns to draw, chosen at random, first of
            all from those that count.
        noise_samples_per_image: noise draws for each of them; the encoder, the VAE and the language model run once.
        normalize_image_loss: divide by the images that count instead of by all.
        vae_dtype: type in which targets are encoded.
        conditions: weight of what drawings are told staying as `model.init_from.checkpoint` says it; 0: it may change.
    """

    text: NonNegativeFloat = 1.0
    image: NonNegativeFloat = 10.0
    image_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    noise_samples_per_image: Positive = 1
    normalize_image_loss: bool = False
    vae_dtype: Precision = "float32"
    conditions: NonNegativeFloat = 0.0

    RENAMED: ClassVar[dict[str, str]] = {"draws_per_image": "It is now 'noise_samples_per_image'"}

    def __post_init__(self) -> None:
        if self.text + self.image == 0:
            raise ValueError("the weights of text and image must not both be 0")


@settings
class SampleConfig:
    """What is generated from time to time, to be looked at.

    Attributes:
        documents: a file of documents with open slots, as `mmi generate` takes it.
        count: how many of its documents.
        num_inference_steps, guidance_scale: of an image; None: the model's guidance.
        max_new_tokens: longest text.
    """

    documents: str | None = None
    count: Count = 4
    num_inference_steps: Positive = 20
    guidance_scale: float | None = None
    max_new_tokens: Positive = 60


@settings
class ShapesConfig:
    """Sizes that batches of documents are brought to, so that a device meets few of them, or always the same.

    A GPU plans its convolutions anew for every number of images, which takes longer than a small model's whole step;
    and starting some ten thousand kernels one by one takes longer than running them.

    Attributes:
        multiple: the images that are seen, those that condition drawings and the contexts of drawings are filled up,
            those that are drawn cut down to a multiple of this.
        images: fill up to so many images; 0: as `multiple` says. What is added is seen by nothing.
        targets: draw so many of them, if there are as many; 0: as `losses.image_fraction` says.
        conditioning: images that condition drawings, likewise. Batches without any get none; a capture with 0 is of
            such batches.
        context: tokens of the contexts of drawings, likewise.
        labelled: tokens to learn, likewise.
        visible: images that a token sees, likewise.
        graph: record the step as a CUDA graph at its first batch of just these sizes, and replay it from then on; other
            batches run as always (the log says how many were replayed). Needs `accumulation: 1`,
            `data.pad_to_max_length` and all sizes but `conditioning`.
    """

    multiple: Positive = 1
    images: Count = 0
    targets: Count = 0
    conditioning: Count = 0
    context: Count = 0
    labelled: Count = 0
    visible: Count = 0
    graph: bool = False

    RENAMED: ClassVar[dict[str, str]] = {"pictures": "It is now 'images'", "drawn": "It is now 'targets'"}

    def __post_init__(self) -> None:
        missing = [name for name in SIZES if self.graph and name != "conditioning" and getattr(self, name) == 0]
        if missing:
            raise ValueError(f"graph needs every size but that of conditioning, and {missing[0]} is 0")


SIZES = ("images", "targets", "conditioning", "context", "labelled", "visible")


@settings(kw_only=True)
class TrainConfig(RunConfig):
    """`mmi train`: a model of documents.

    Attributes:
        model: where it comes from.
        data: what it learns from.
        eval_data: held-out data for the loss shown as `eval_loss`.
        eval_batches: how many batches of it.
        losses: their weights.
        samples: what is generated on the way.
        shapes: sizes that batches are brought to.
        evaluation: tasks that are given to the model on the way, as in an evaluation's file.
        evaluate_every: steps between two evaluations; 0: never.
    """

    model: ModelConfig
    data: DataConfig
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    eval_data: DataConfig | None = None
    eval_batches: Positive = 20
    losses: LossConfig = field(default_factory=LossConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    evaluation: TaskSuite | None = None
    evaluate_every: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapes.graph and (self.accumulation > 1 or self.precision == "float16"):
            raise ValueError("shapes.graph needs accumulation: 1 and no scaling of the loss, which float16 has")
        if self.shapes.graph and self.gradient_checkpointing:
            raise ValueError("shapes.graph keeps all activations; leave gradient_checkpointing out")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise ValueError("selective_checkpointing is a kind of gradient_checkpointing; set that, too")
        if self.shapes.graph and not self.data.pad_to_max_length:
            raise ValueError("shapes.graph needs data.pad_to_max_length: true")
        if self.losses.conditions and self.model.init_from.checkpoint is None:
            raise ValueError(
                "'losses.conditions' holds on to what a checkpoint says: give 'model.init_from.checkpoint'"
            )
        if self.eval_every and self.eval_data is None:
            raise ValueError("'eval_every' needs held-out data: give 'eval_data', or set it to 0")
        if self.evaluate_every and self.evaluation is None:
            raise ValueError("'evaluate_every' needs the tasks: give 'evaluation'")
        if self.evaluate_every and self.fsdp:
            raise ValueError("'evaluate_every' needs whole weights, which a process does not have with 'fsdp'; "
                             "evaluate the checkpoints with mmi evaluate")  # fmt: skip

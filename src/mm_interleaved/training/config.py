"""The settings of a training run, read from YAML by `load_config`."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from ..adapters.settings import AdapterSettings
from ..checkpoints.quantization import FrozenQuantization
from ..data.config import DataConfig, ReplayConfig
from ..evaluation.config import TaskSuite, task_name
from ..validation import Count, Decay, NonNegativeFloat, Positive, PositiveFloat, Seed, Share, settings
from . import familiar

Precision = Literal["float32", "bfloat16", "float16"]
ModelPart = Literal["llm", "vision", "image_decoder", "mmfs"]


FRESH = "fresh"


class TrainingError(RuntimeError):
    """Training cannot continue; the message states why, and which file has details."""


@settings
class GroupConfig:
    """Settings for parameters whose name contains `pattern`; None: the optimizer's value.

    Attributes:
        pattern: regular expression that is searched for in the names of the model's parameters.
        lr: their learning rate.
        weight_decay: their weight decay.
    """

    pattern: str
    lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None


@settings
class MuonConfig:
    """Muon, for weights of linear layers and convolutions. AdamW trains the others and those that `plain` matches."""

    scale: PositiveFloat = 0.2  # root mean square of an update, in learning rates; AdamW's is about 0.2 to 0.4
    momentum: Decay = 0.95  # of the average of gradients
    # Regular expressions: the first and last layers, and layers that predict sampling positions.
    plain: list[str] = field(
        default_factory=lambda: ["lm_head", "conv_in", "conv_out", "offset", "attention_weights", "patch_embedding"]
    )


@settings
class OptimizerConfig:
    """The optimizer. Biases, LayerNorms and parameters that `no_decay` matches have no weight decay.

    Attributes:
        kind: AdamW for all parameters, or Muon for matrices and AdamW for the others.
        lr: learning rate of parameters that no group matches.
        betas: decays of AdamW's averages of the gradient and of its square.
        eps: AdamW's term in the denominator.
        weight_decay: decay of the weights in each step, times the learning rate.
        max_grad_norm: gradients with a larger norm are scaled down to it; 0: no clipping.
        groups: other values for some parameters; the first group that matches is used.
        no_decay: regular expressions of the names of parameters without weight decay.
        muon: settings of Muon.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [0.9, 0.995])
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.05
    max_grad_norm: NonNegativeFloat = 1.0
    groups: list[GroupConfig] = field(default_factory=list)
    no_decay: list[str] = field(default_factory=list)
    muon: MuonConfig = field(default_factory=MuonConfig)


@settings
class ScheduleConfig:
    """The learning rate over time, as a fraction of each group's rate."""

    kind: Literal["cosine", "constant", "linear"] = "cosine"  # after the warm-up
    warmup_steps: Count = 0  # rises linearly from 0
    min_share: Share = 0.0  # cosine ends here

    def __post_init__(self) -> None:
        if self.min_share and self.kind != "cosine":
            raise ValueError(f"'min_share' is where a cosine ends; 'kind' is {self.kind}")


@settings
class EMAConfig:
    """An exponential moving average of the weights, which is evaluated and saved at the end of a run."""

    decay: Decay = 0.0  # 0: off
    start_step: Count = 0  # the average begins with the weights of this step


@settings
class DDPConfig:
    """Data-parallel training under torchrun."""

    find_unused_parameters: bool = True  # parameters without a gradient in a step are found, not waited for
    static_graph: bool = False  # every step uses the same parameters; faster than finding unused ones
    bucket_cap_mb: Positive = 25  # gradients are sent in buckets of this size


@settings
class RunConfig:
    """The settings that all training runs have.

    Attributes:
        output: folder of the run: `config.yaml`, `log.jsonl`, TensorBoard files, `checkpoint-N`, `final`.
        steps: number of optimizer steps. Exactly one of `steps` and `epochs` is given.
        epochs: number of passes over the data, also a fraction of one. It becomes a number of steps before training
            begins: the batches of the first epoch are counted, from texts and image headers only.
        seed: seed of the initialisation and of all random choices.
        accumulation: number of batches in a step.
        precision: type of matrix products. Trainable weights are always stored in float32.
        compile: "regional" compiles the repeated blocks, "decoder" only the layers of the language model.
        log_every, save_every, eval_every, sample_every: numbers of steps between two of each; 0: never.
        keep_checkpoints: how many of the newest checkpoints are kept.
        sharded_checkpoints: every process writes its part of a checkpoint, which any number of processes can resume
            from; always with `fsdp`. Such a checkpoint is no model folder; `final` and `best` are.
        async_checkpoints: sharded checkpoints are written while training goes on, from a copy in the CPU's memory.
        resume: "auto" (from the newest undamaged checkpoint, if there is one), "never", or a checkpoint folder.
        deepspeed: path of a DeepSpeed configuration, which controls data parallelism; needs torchrun.
        fsdp: settings of transformers' `fsdp_config` (`{"fsdp_version": 2, ...}`): weights, gradients and the
            optimizer's state are divided over the GPUs of all processes. A single process has nothing to divide.
        tf32: use TensorFloat-32 for float32 matrix products on GPUs that have it.
        optimizer: the optimizer.
        schedule: the learning rate over time.
        ema: an average of the weights.
        ddp: settings of data-parallel training.
        gradient_checkpointing: recompute activations in the backward pass; a third more arithmetic, far less memory.
        selective_checkpointing: keep some of the activations, see `enable_checkpointing`.
        peak_tflops: peak of one device, for the MFU; None: the known peak of common devices, else no MFU is shown.
        tensorboard: write TensorBoard files.
        trainer: further settings of transformers' `TrainingArguments` by name (`report_to`, `optim`,
            `lr_scheduler_type`, ...), without those that have a setting of their own here.
    """

    output: str
    steps: Positive | None = None
    epochs: PositiveFloat | None = None
    seed: Seed = 0
    accumulation: Positive = 1
    precision: Precision = "bfloat16"
    compile: Literal["none", "regional", "decoder"] = "none"
    log_every: Positive = 10
    save_every: Count = 1000
    eval_every: Count = 0
    sample_every: Count = 0
    keep_checkpoints: Positive = 5
    sharded_checkpoints: bool = False
    async_checkpoints: bool = False
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
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise ValueError(f"give one of 'steps' and 'epochs', not {given}; the other is null")
        if self.deepspeed and self.fsdp:
            raise ValueError("give 'deepspeed' or 'fsdp', not both")
        if self.ema.decay and self.deepspeed:
            raise ValueError("'ema.decay' needs weights that 'deepspeed' does not divide; set it to 0, or take 'fsdp'")
        if self.optimizer.kind == "muon" and self.deepspeed:
            raise ValueError("'optimizer.kind: muon' needs matrices, which 'deepspeed' makes flat; use adamw or 'fsdp'")
        if self.sharded_checkpoints and self.deepspeed:
            raise ValueError("'sharded_checkpoints' are not for 'deepspeed', which writes a format of its own")
        if self.async_checkpoints and not (self.sharded_checkpoints or self.fsdp):
            raise ValueError("'async_checkpoints' are a kind of 'sharded_checkpoints'; set that, too")


@settings
class ComponentsConfig:
    """Folders of base models, as for `mmi assemble`.

    Attributes:
        llm: language model (Llama, Mistral, Qwen2 or Qwen3).
        clip: CLIP, whose image encoder is used.
        diffusion: Stable Diffusion, whose UNet and VAE are used.
    """

    llm: str
    clip: str
    diffusion: str


@settings
class MMFSSwitches:
    """Which parts of the model have synchronizers.

    Attributes:
        llm: the language model.
        unet: the UNet of the image decoder.
    """

    llm: bool = True
    unet: bool = True


@settings
class InitConfig:
    """The origin of a model's weights: exactly one of three.

    Attributes:
        preset: `release`, `small` or `debug`, with new random weights.
        checkpoint: folder of a model, whose weights are loaded (to continue a run, see `resume`).
        components: base models to combine.
    """

    preset: Literal["release", "small", "debug"] | None = None
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
    """Parameters with another origin than the rest of the model.

    Attributes:
        source: `from` in files. Folder of a model, of a part of one, or of a
            diffusers VAE, whose sizes the image decoder adopts; or `fresh`, for new random values.
        parameters: regular expression that is searched for in the names of the model's parameters; None: all parameters
            in the folder.
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
        init_from: the origin of its weights.
        weights: parameters with another origin. No parameter may match two entries, so the order does not matter.
        tokenizer: folder or SentencePiece file; None: that of the checkpoint, the language model, or this package.
        mmfs: which parts have synchronizers.
        overrides: values that replace those of the model's configuration, nested in the same way.
        quantize: store frozen linear layers in fewer bits while an adapter is trained: `int8`, `nf4` or `int4` (4 bits)
            by torchao, or `bnb-nf4` (4 bits) by bitsandbytes.
        quantize_parts: the parts with these layers, by the names of `freeze`.
    """

    init_from: InitConfig
    weights: list[WeightsConfig] = field(default_factory=list)
    tokenizer: str | None = None
    mmfs: MMFSSwitches = field(default_factory=MMFSSwitches)
    overrides: dict[str, Any] = field(default_factory=dict)
    quantize: FrozenQuantization = "none"
    quantize_parts: list[ModelPart] = field(default_factory=lambda: ["llm"])

    RENAMED: ClassVar[dict[str, str]] = {
        **{name: f"It is now 'init_from.{name}'" for name in ("preset", "checkpoint", "components")},
        **dict.fromkeys(("vae", "vision", "language"), "It is now an entry of 'weights': {from: FOLDER}"),
        "unet": "It is now an entry of 'weights': {from: FOLDER, parameters: '^image_decoder\\.unet\\.'}",
        "fresh": "It is now an entry of 'weights': {from: fresh, parameters: PATTERN}",
    }

    def __post_init__(self) -> None:
        if any(entry.source == FRESH for entry in self.weights) and self.init_from.checkpoint is None:
            raise ValueError(
                "'from: fresh' gives parameters of a checkpoint new random values, and there is no checkpoint; "
                "set init_from.checkpoint or remove the entry"
            )


@settings
class LossConfig:
    """Weights of the losses, and how the image loss is computed.

    Attributes:
        text, image: weights (release: 1 and 10).
        image_fraction: fraction of a batch's images that the image decoder is trained on. They are chosen at random,
            first among those with an image loss.
        noise_samples_per_image: noise samples for each of them; the encoder, VAE and language model run once.
        scale: what the losses are means over: `batch` (over the labels and the images of each batch, where batches and
            processes have equal weight, as in the release) or `global` (over all labels, and all images with a loss, of
            a step: of all its batches on all processes; the image decoder runs for images with a loss only).
        normalize_image_loss: with `scale: batch`, divide by the number of images with a loss and not by the number of
            all images.
        vae_dtype: type in which target images are encoded.
        conditions: weight of the distance of the image decoder's conditions from those of
            `model.init_from.checkpoint`; 0: they may change.
    """

    text: NonNegativeFloat = 1.0
    image: NonNegativeFloat = 10.0
    image_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    noise_samples_per_image: Positive = 1
    scale: Literal["global", "batch"] = "batch"
    normalize_image_loss: bool = False
    vae_dtype: Precision = "float32"
    conditions: NonNegativeFloat = 0.0

    RENAMED: ClassVar[dict[str, str]] = {"draws_per_image": "It is now 'noise_samples_per_image'"}

    def __post_init__(self) -> None:
        if self.text + self.image == 0:
            raise ValueError("the weights of text and image must not both be 0")
        if self.scale == "global" and self.normalize_image_loss:
            raise ValueError("'normalize_image_loss' is a choice of 'scale: batch'; 'scale: global' always divides by "
                             "the images with a loss")  # fmt: skip
        if self.scale == "global" and self.conditions:
            raise ValueError("'conditions' is a mean over a batch; take 'scale: batch'")


@settings
class SampleConfig:
    """Samples that are generated and saved during training.

    Attributes:
        documents: a file of documents with open slots, as for `mmi generate`.
        from_data: without `documents`: take documents of `eval_data`, or else of `data`, and generate the last part of
            each that has a loss.
        count: how many of its documents are used.
        num_inference_steps, guidance_scale: settings of an image; None: the model's guidance.
        max_new_tokens: maximum length of a text.
    """

    documents: str | None = None
    from_data: bool = False
    count: Positive = 4
    num_inference_steps: Positive = 20
    guidance_scale: float | None = None
    max_new_tokens: Positive = 60


@settings
class ShapesConfig:
    """Sizes to which batches are padded, so that a device meets few different sizes or only one.

    cuDNN plans convolutions again for every number of images, which takes longer than a whole step of a small model.
    Launching about ten thousand kernels one by one takes longer than running them.

    Attributes:
        multiple: the numbers of input images, of images and of tokens that condition image generation are padded to a
            multiple of this; the number of target images is reduced to a multiple of it.
        images: pad to this number of input images; 0: to a `multiple`. Nothing attends to the padding.
        targets: train the image decoder on this number of images, if there are as many; 0: `losses.image_fraction`
            decides.
        conditioning: pad to this number of images that condition image generation. Batches without any are not padded;
            with 0 a graph is captured for such batches.
        context: pad to this number of tokens that condition image generation.
        labelled: pad to this number of tokens with a loss.
        visible: pad to this number of images that a token attends to.
        graph: capture the step as a CUDA graph at the first batch of exactly these sizes, and replay it for all others
            of them; other batches run without it (the log has the number of replayed ones). Needs `accumulation: 1`,
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


@settings
class EarlyStoppingConfig:
    """The task metric by which the best checkpoint is chosen, and when a run stops because it no longer improves.

    Attributes:
        metric: `TASK/VALUE`: the name of a task in `evaluation`, and one of its main values (`vqav2/accuracy`).
        patience: the run stops after this number of evaluations without improvement; null: it never stops early, and
            only the best checkpoint is kept.
        min_delta: an improvement is larger than this.
        mode: whether the `max` or the `min` is best; null: `min` for values that are errors (FID, ranks), else `max`.
    """

    metric: str
    patience: Positive | None = 3
    min_delta: NonNegativeFloat = 0.0
    mode: Literal["max", "min"] | None = None

    def __post_init__(self) -> None:
        task, slash, value = self.metric.rpartition("/")
        if not (task and slash and value):
            raise ValueError(f"'metric' is TASK/VALUE, as vqav2/accuracy, not '{self.metric}'")

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.metric.rpartition("/")[0]


@settings
class HubConfig:
    """A repository of a model hub that gets the final model.

    Attributes:
        repo: `OWNER/NAME`; created if it does not exist.
        private: whether only its owner sees it. A public repository is refused where this is true.
    """

    repo: str
    private: bool = True


@settings(kw_only=True)
class TrainConfig(RunConfig):
    """The settings of `mmi train`.

    Attributes:
        model: the model.
        adapter: the adapter that is trained in place of the model's own weights; None: these are trained.
        freeze: parts that are not trained: `llm` (language model and text head), `vision` (visual tokenizer),
            `image_decoder` (resampler and UNet), each without its synchronizers, and `mmfs` (all synchronizers).
        data: the training data.
        replay: documents of earlier training that are mixed in, so that the model forgets less.
        eval_data: held-out data for the loss shown as `eval_loss`.
        eval_batches: how many batches of it are used.
        losses: the losses and their weights.
        samples: what is generated during training.
        shapes: sizes to which batches are padded.
        evaluation: tasks for evaluations during training, as in the file of an evaluation.
        evaluate_every: steps between two evaluations; 0: never.
        early_stopping: the task metric that chooses the best checkpoint and ends a run that no longer improves.
        push_to_hub: the repository that gets the final model.
    """

    model: ModelConfig
    adapter: AdapterSettings | None = None
    freeze: list[ModelPart] = field(default_factory=list)
    data: DataConfig
    replay: ReplayConfig | None = None
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    eval_data: DataConfig | None = None
    eval_batches: Positive = 20
    losses: LossConfig = field(default_factory=LossConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    evaluation: TaskSuite | None = None
    evaluate_every: Count = 0
    early_stopping: EarlyStoppingConfig | None = None
    push_to_hub: HubConfig | None = None

    suggest = staticmethod(familiar.suggest)

    @property
    def training_data(self) -> DataConfig:
        """`data` with the sources of `replay`."""
        return self.data if self.replay is None else self.data.with_replay(self.replay)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.training_data  # raises an error if names are equal
        if self.adapter is not None:
            self._check_adapted(self.model)
        if self.model.quantize != "none" and (self.adapter is None or self.fsdp or self.deepspeed):
            raise ValueError("'model.quantize' is for the frozen base of an 'adapter', on devices with the whole model "
                             "(no 'fsdp', no 'deepspeed')")  # fmt: skip
        if self.adapter is None and set(self.freeze) == set(get_args(ModelPart)):
            raise ValueError(
                "'freeze' names all parts, so nothing is left to train: leave one out, or train an 'adapter'"
            )
        if self.epochs is not None and self.data.sampling == "forever":
            raise ValueError("'epochs' needs data that end, and 'data.sampling: forever' never does; give 'steps'")
        if self.early_stopping is not None:
            self._check_stopping(self.early_stopping)
        if self.shapes.graph and (self.accumulation > 1 or self.precision == "float16"):
            raise ValueError("shapes.graph needs accumulation: 1 and no scaling of the loss, which float16 has")
        if self.shapes.graph and self.gradient_checkpointing:
            raise ValueError("shapes.graph keeps all activations; leave gradient_checkpointing out")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise ValueError("selective_checkpointing is a kind of gradient_checkpointing; set that, too")
        if self.shapes.graph and not self.data.pad_to_max_length:
            raise ValueError("shapes.graph needs data.pad_to_max_length: true")
        if self.losses.conditions and self.model.init_from.checkpoint is None:
            raise ValueError("'losses.conditions' compares with a checkpoint: give 'model.init_from.checkpoint'")
        if self.eval_every and self.eval_data is None:
            raise ValueError("'eval_every' needs held-out data: give 'eval_data', or set it to 0")
        if self.evaluate_every and self.evaluation is None:
            raise ValueError("'evaluate_every' needs the tasks: give 'evaluation'")

    @staticmethod
    def _check_adapted(model: ModelConfig) -> None:
        """An adapter belongs to the weights of one folder."""
        if model.init_from.checkpoint is None:
            raise ValueError("'adapter' needs a checkpoint as its base: give 'model.init_from.checkpoint' "
                             "(mmi assemble makes one of base components)")  # fmt: skip
        if model.weights or not (model.mmfs.llm and model.mmfs.unet):
            raise ValueError("'adapter' needs the weights of the checkpoint as they are: leave out 'model.weights' and "
                             "'model.mmfs'")  # fmt: skip

    def _check_stopping(self, stopping: EarlyStoppingConfig) -> None:
        if self.evaluation is None or not self.evaluate_every:
            raise ValueError("'early_stopping' follows a task metric: give 'evaluation' and 'evaluate_every'")
        names = [task_name(task) for task in self.evaluation.chosen()]
        if stopping.task not in names:
            raise ValueError(f"early_stopping.metric '{stopping.metric}': 'evaluation' has no task '{stopping.task}', "
                             f"only {', '.join(names)}")  # fmt: skip

"""Trains the small model by its recipe: `python -m toyworld.small.run OUTPUT --minutes N`.

Each call continues where the last one stopped, and ends within its minutes: it writes the averaged weights in bfloat16
and its state. The seed of the part determines its documents. If the file of the optimizer is missing (on another
machine), the optimizer starts again from the weights, with a short warm-up. Under torchrun the processes share each
batch, one GPU each; the first writes the files. OUTPUT has

    state.json         the stage, its step, and for each part the seed, steps, seconds and SHA-256 of the weights
    log.jsonl          losses every 50 steps, and the results on held-out documents
    autoencoder/       the autoencoder, a diffusers folder
    model/             the model, its processor and the auxiliary classifiers
    optimizer.safetensors    float32 weights and moments; not needed on another machine
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mm_interleaved import MMInterleaved
from mm_interleaved.configuration import load_config
from mm_interleaved.io.writing import write_json
from mm_interleaved.model.diffusion_blocks import VAE
from mm_interleaved.pretrained import TOKENIZER
from mm_interleaved.processor import MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.training.pipeline import seed_of

from .autoencoder import AutoencoderTask, latent_scale, save_autoencoder
from .compose import Composer
from .config import Arm, Shape
from .fast import quicken
from .heads import Readers
from .layers import Atlas
from .optimizer import CapturableOptimizer
from .ranks import Ranks
from .recipe import Recipe, Stage
from .rows import ToyRows
from .scenes import ToyScenes
from .step import DocumentTask, Measures, PixelTask, TrainStep, means

LOG_EVERY = 50
SIZE = 128  # side of the images
SAVING = 25.0  # seconds that the end of a part takes
STARTING = 60.0  # seconds without which no part is begun
HELD_OUT = 8  # batches of the split val at the end of a part
OPTIMIZER = "optimizer.safetensors"
SHARD = "12MB"  # largest file of weights


@dataclass
class State:
    """Where a run stands.

    Attributes:
        stage: number of the stage.
        step: steps of it that are done.
        parts: what each part did.
    """

    stage: int = 0
    step: int = 0
    parts: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A run of the recipe in a folder.

    Args:
        recipe: what to do.
        output: where it stands.
        seconds: that this call may take.
        ranks: this process, among those that train together.
        workers: processes that make documents, for each of `ranks`.
    """

    def __init__(self, recipe: Recipe, output: Path, seconds: float, ranks: Ranks, workers: int) -> None:
        self.recipe, self.output, self.ranks, self.workers = recipe, output, ranks, workers
        device = self.device = ranks.device
        self.begun, self.seconds = time.monotonic(), seconds
        output.mkdir(parents=True, exist_ok=True)
        path = output / "state.json"
        self.state = State(**json.loads(path.read_text())) if path.is_file() else State()
        self.atlas = Atlas(SIZE)
        self.composer = Composer(self.atlas, device)
        ranks.wait()  # nobody writes before all have read where the run stands
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @property
    def left(self) -> float:
        """Seconds that this call still has for training."""
        return self.seconds - SAVING - (time.monotonic() - self.begun)

    def go(self) -> bool:
        """Do what there is time for; whether everything is done."""
        while self.state.stage < len(self.recipe.stages):
            if not self.ranks.agree(self.left >= STARTING):
                return False
            stage = self.recipe.stages[self.state.stage]
            if stage.kind == "documents":
                self._documents(stage)
            elif self.recipe.autoencoder is None:
                self._images(stage)
            else:
                self.state.step = stage.steps
            if self.state.step < stage.steps:
                return False
            self.state.stage, self.state.step = self.state.stage + 1, 0
            self._keep_state()
        return True

    # ---- stages

    def _images(self, stage: Stage) -> None:
        """Train the autoencoder."""
        part = self._begin(stage)
        task = PixelTask(self._autoencoder())
        folder = self.output / "autoencoder"
        if self.state.step:
            load_autoencoder(task.task.vae, folder)
        task.to(self.device, self.dtype).train()
        optimizer = CapturableOptimizer(task, stage.optimizer)
        own, count = seed_of(part["seed"], self.ranks.rank), self.ranks.share(stage.images, "images")

        def batches(seed: int, split: Any = "train") -> Iterator[Any]:
            return self._loader(ToyScenes(count, self.atlas, seed, split))

        self._train(stage, part, task, optimizer, lambda step: batches(seed_of(own, step)), lambda step: None)
        optimizer.load_averages()
        if not self.ranks.first:
            return self._end(part, optimizer)
        with torch.no_grad():
            pixels = self.composer(next(batches(self.recipe.seed, "val")).pictures)
            encoded = task.task.vae.encode((pixels.float() / 127.5 - 1).to(self.dtype))
            latents = cast(AutoencoderKLOutput, encoded).latent_dist.mode()
        vae = self._autoencoder().vae
        nn.Module.to(vae, torch.bfloat16)
        vae.load_state_dict(task.task.vae.state_dict())
        save_autoencoder(vae, latent_scale(latents), folder)
        found = self._held_out(task, batches(self.recipe.seed, "val"))
        return self._end(part, optimizer, folder, found)

    def _documents(self, stage: Stage) -> None:
        """Train everything else."""
        part = self._begin(stage)
        folder = self.output / "model"
        model, readers = self._model(folder, stage)
        processor = MMInterleavedProcessor.for_model(model.config, MMInterleavedTokenizer.from_vocab(TOKENIZER))
        if self.device.type == "cuda":
            quicken(model)
        task = DocumentTask(model.to(self.device, self.dtype).train(), readers.to(self.device), stage.weights)
        optimizer = CapturableOptimizer(task, stage.optimizer)
        own, sizes = seed_of(part["seed"], self.ranks.rank), stage.sizes.shared(self.ranks)

        def batches(step: int, seed: int, split: Any = "train") -> Iterator[Any]:
            phase = stage.phase(step)
            few, many = phase.objects
            rows = ToyRows(sizes, processor, self.atlas, seed, phase.mix, (few, many), split)
            return self._loader(rows)

        def before(step: int) -> None:
            task.asking.fill_(stage.asking(step))

        self._train(
            stage, part, task, optimizer, lambda step: batches(step, seed_of(own, step)), before,
            starts=[int(phase.until * stage.steps) for phase in stage.phases],
        )  # fmt: skip
        optimizer.load_averages()
        if not self.ranks.first:
            return self._end(part, optimizer)
        found = self._held_out(task, batches(stage.steps - 1, self.recipe.seed, "val"))
        self._save(model, readers, processor, folder)
        return self._end(part, optimizer, folder, found)

    def _train(
        self, stage: Stage, part: dict[str, Any], task: Callable[[Any, Tensor], Measures],
        optimizer: CapturableOptimizer, loader: Callable[[int], Iterator[Any]], before: Callable[[int], None],
        starts: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Steps until the stage or the time is over; `starts` are steps at which another loader begins."""
        batches, kept = loader(self.state.step), []
        step = TrainStep(task, optimizer, self.composer, next(batches), self.ranks)
        begun = self._resumed(stage, optimizer)
        since, counted, rows = time.monotonic(), self.state.step, 0
        while self.state.step < stage.steps and self.ranks.agree(self.left > 0):
            number = self.state.step
            if number in (starts or []) and number > part["from"]:
                batches = loader(number)
            before(number)
            batch = next(batches)
            found = step(batch, stage.rate(number, begun))
            rows += getattr(batch, "documents", stage.images // self.ranks.world)
            kept.append({name: value.clone() for name, value in found.items()})
            self.state.step += 1
            if self.state.step % LOG_EVERY == 0 or self.state.step == stage.steps:
                losses, now = means(kept), time.monotonic()
                losses = {name: self.ranks.total(value) / self.ranks.world for name, value in losses.items()}
                kept, documents = [], self.ranks.total(rows)
                speed = {"steps_s": (self.state.step - counted) / (now - since),
                         "documents_s": documents / (now - since)}  # fmt: skip
                since, counted, rows = now, self.state.step, 0
                self._log(stage=stage.name, step=self.state.step, rate=stage.rate(number, begun), **speed, **losses)
                if not losses["loss"] < float("inf"):
                    raise FloatingPointError(
                        f"stage '{stage.name}', step {self.state.step}: the loss is {losses['loss']}"
                    )

        self._keep_optimizer(stage, optimizer, begun)

    def _resumed(self, stage: Stage, optimizer: CapturableOptimizer) -> int:
        """Load the optimizer of the part before, if it is here; the step at which the optimizer was new."""
        path = self.output / OPTIMIZER
        if self.state.step and path.is_file():
            with safe_open(path, "pt") as file:
                about = file.metadata()
            if (about["stage"], int(about["step"])) == (stage.name, self.state.step):
                optimizer.load_state(load_file(path))
                return int(about["begun"])
        return self.state.step

    def _keep_optimizer(self, stage: Stage, optimizer: CapturableOptimizer, begun: int) -> None:
        if not self.ranks.first:
            return
        path = self.output / OPTIMIZER
        path.unlink(missing_ok=True)
        if self.state.step < stage.steps:
            about = {"stage": stage.name, "step": str(self.state.step), "begun": str(begun)}
            save_file({name: value.cpu() for name, value in optimizer.state().items()}, path, about)

    @torch.no_grad()
    def _held_out(self, task: nn.Module, batches: Iterator[Any]) -> dict[str, float]:
        """Means over some held-out batches; of documents also the image loss with the conditions of other images."""
        task.eval()
        kept = []
        for _ in range(HELD_OUT):
            batch = next(batches)
            pixels = self.composer(batch.pictures)
            given = batch if isinstance(task, PixelTask) else batch.to(self.device)
            torch.manual_seed(self.recipe.seed)
            found = task(given, pixels)
            if isinstance(task, DocumentTask):
                torch.manual_seed(self.recipe.seed)
                with other_conditions(task):
                    found["image_with_other_conditions"] = task(given, pixels)["image"]
            kept.append(found)
        task.train()
        return {f"val_{name}": value for name, value in means(kept).items()}

    # ---- models and files

    def _autoencoder(self) -> AutoencoderTask:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return AutoencoderTask(VAE(**self.recipe.shape.tree()["image_decoder"]["vae"] | {"scaling_factor": 1.0}))

    def _model(self, folder: Path, stage: Stage) -> tuple[MMInterleaved, Readers]:
        """The model of the last part, or a new one with the trained autoencoder."""
        shape = self.recipe.shape
        if stage.zero_snr is not None:
            shape = replace(shape, zero_snr=stage.zero_snr)
        if (folder / "config.json").is_file():
            model = MMInterleaved.from_pretrained(folder, dtype=torch.float32)
            model.config.image_decoder.scheduler |= shape.schedule()
            readers = Readers(model.config)
            if (folder / "readers.safetensors").is_file():
                readers.load_state_dict(load_file(folder / "readers.safetensors"))
            return model, readers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            model = new_model(shape, self.recipe.arm)
            readers = Readers(model.config)
        vae = model.image_decoder.vae
        load_autoencoder(vae, self.recipe.autoencoder or self.output / "autoencoder")
        model.config.image_decoder.vae["scaling_factor"] = vae.config["scaling_factor"]
        return model, readers

    def _save(self, model: MMInterleaved, readers: Readers, processor: MMInterleavedProcessor, folder: Path) -> None:
        """As a fresh model of the same configuration, since the trained one holds modules made for training."""
        plain = MMInterleaved(model.config).to(torch.bfloat16)
        plain.load_state_dict({name: value.to("cpu", torch.bfloat16) for name, value in model.state_dict().items()})
        plain.save_pretrained(folder, max_shard_size=SHARD)
        processor.save_pretrained(folder)
        save_file(
            {name: x.cpu().contiguous() for name, x in readers.state_dict().items()}, folder / "readers.safetensors"
        )

    def _loader(self, dataset: IterableDataset[Any]) -> Iterator[Any]:
        if not self.workers:
            return iter(dataset)
        cuda = self.device.type == "cuda"
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.workers, pin_memory=cuda, prefetch_factor=3,
                               multiprocessing_context="fork"))  # fmt: skip

    def _begin(self, stage: Stage) -> dict[str, Any]:
        seed = seed_of(self.recipe.seed, self.state.stage, len(self.state.parts))
        torch.manual_seed(seed_of(seed, self.ranks.rank))
        self._log(
            stage=stage.name, begins=self.state.step, seed=seed, device=device_name(self.device),
            processes=self.ranks.world,
        )  # fmt: skip
        return {"stage": stage.name, "seed": seed, "from": self.state.step, "at": time.monotonic() - self.begun}

    def _end(
        self, part: dict[str, Any], optimizer: CapturableOptimizer, folder: Path | None = None,
        held_out: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Note what a part did, and the sums of what the first process wrote to `folder`."""
        weights = optimizer.master.double().mean()
        apart = float((weights - self.ranks.average_(weights.clone())).abs())
        done = {**part, "to": self.state.step, "seconds": round(time.monotonic() - self.begun - part["at"], 1)}
        del done["at"]
        if folder is not None:
            paths = sorted(folder.glob("*.safetensors"))
            done["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        self.state.parts.append(done)
        self._log(**done, processes_apart=apart, **(held_out or {}))
        self._keep_state()
        self.ranks.wait()  # the next part of all reads what the first has written

    def _keep_state(self) -> None:
        if not self.ranks.first:
            return
        write_json(self.output / "state.json", asdict(self.state))

    def _log(self, **entry: Any) -> None:
        if not self.ranks.first:
            return
        entry = {"second": round(time.monotonic() - self.begun, 1), **entry}
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()})
        with (self.output / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line[:400], flush=True)


def new_model(shape: Shape, arm: Arm = "both") -> MMInterleaved:
    """A model from nothing; no token starts less likely than others, as the release's new ones do beside a Vicuna."""
    model = MMInterleaved(shape.config(arm))
    with torch.no_grad():
        model.lm_head.head.bias.zero_()
        model.lm_head.new.bias.zero_()
    return model


def load_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    """Weights and scale of the latents that `save_autoencoder` wrote."""
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    vae.register_to_config(scaling_factor=json.loads((folder / "config.json").read_text())["scaling_factor"])


@contextmanager
def other_conditions(task: DocumentTask) -> Iterator[None]:
    """Every image is drawn from the conditions of its neighbour in the batch."""
    hook = task.model.image_decoder.resampler.register_forward_hook(lambda m, args, out: out.roll(1, 0), prepend=True)
    try:
        yield
    finally:
        hook.remove()


def device_name(device: torch.device) -> str:
    """What computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main() -> None:
    """Train for so many minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--minutes", type=float, required=True, help="that this call may take, all in all")
    parser.add_argument("--recipe", type=Path, default=Path("configs/small/recipe.yaml"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=14, help="processes that make documents, for each GPU")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_intermixed_args()
    recipe = load_config(options.recipe, Recipe, options.changes)
    begun = time.monotonic()
    with Ranks.joined(options.device) as ranks:
        left = 60 * options.minutes - (time.monotonic() - begun)
        run = Run(recipe, options.output, left, ranks, options.workers)
        done = run.go()
    if ranks.first:
        print("done" if done else f"goes on with stage {run.state.stage}, step {run.state.step}: the same command")


if __name__ == "__main__":
    main()

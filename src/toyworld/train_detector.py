"""Trains the detector on scenes that are drawn as it goes, and measures it on held-out ones.

python -m toyworld.train_detector --steps 3000 --batch 256 --device cuda --workers 15
python -m toyworld.train_detector --steps 1500 --batch 64 --peak 4e-4 --seed 1 --start
detector.safetensors
python -m toyworld.train_detector --evaluate
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from .detector import MAP, PIXELS, TRAITS, WEIGHTS, Detection, Detector, DetectorNet, split
from .draw import boxes, draw
from .sampling import Split, random_scene, scene_rng
from .scene import SIZES, Place, Scene, SceneObject

MOST = 9  # objects in a scene
NEAR = 1 / 6  # how far from an object's middle it may be found, in images
_CROWDED = 0.25  # share of training scenes with more objects than stories have
_JPEG = 0.3  # share of training images that go through JPEG

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SceneBatches(Dataset[Batch]):
    """Batches by number, each always the same: images uint8 [B, 3, 128, 128]; geometry float32 [B, 9, 4], the boxes'
    middles and sides in images; traits int64 [B, 9, 6], the size (-1: no object) and then `TRAITS`.
    """

    def __init__(self, batches: int, batch: int, seed: int) -> None:
        self.batches, self.batch, self.seed = batches, batch, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < self.batches:
            raise IndexError(number)
        images = np.empty((self.batch, PIXELS, PIXELS, 3), np.uint8)
        geometry = np.zeros((self.batch, MOST, 4), np.float32)
        traits = np.full((self.batch, MOST, 1 + len(TRAITS)), -1, np.int64)
        for i in range(self.batch):
            rng = scene_rng(self.seed, "train", number * self.batch + i)
            scene = random_scene(rng, objects=(5, MOST) if rng.random() < _CROWDED else (1, 5), split="train")
            image = draw(scene, PIXELS)
            images[i] = np.asarray(_jpeg(image, int(rng.integers(35, 95))) if rng.random() < _JPEG else image)
            geometry[i], traits[i] = labels(scene)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(geometry), torch.from_numpy(traits)


def labels(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """What a scene shows, as in `SceneBatches`: geometry [9, 4] and traits [9, 6].

    Raises:
        ValueError: it has more objects.
    """
    if len(scene.objects) > MOST:
        raise ValueError(f"a scene of {len(scene.objects)} objects; labels have room for {MOST}")
    geometry, traits = torch.zeros(MOST, 4), torch.full((MOST, 1 + len(TRAITS)), -1)
    for number, (obj, box) in enumerate(zip(scene.objects, boxes(scene, PIXELS), strict=True)):
        geometry[number] = torch.tensor(middle(box))
        traits[number] = torch.tensor(described(obj))
    return geometry, traits


def _jpeg(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return PIL.Image.open(file)


def middle(box: tuple[int, ...]) -> tuple[float, ...]:
    """A box at `PIXELS` as its middle x, y and its width, height, in images."""
    x0, y0, x1, y1 = box
    return (x0 + x1) / 2 / PIXELS, (y0 + y1) / 2 / PIXELS, (x1 - x0) / PIXELS, (y1 - y0) / PIXELS


def described(obj: SceneObject) -> list[int]:
    """An object's size and `TRAITS` as numbers."""
    return [SIZES.index(obj.size)] + [values.index(getattr(obj.attributes, name)) for name, values in TRAITS.items()]


def spoil(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What an autoencoder and a diffusion model do to an image: lost detail, blur, noise, wrong brightness and tint.

    Args:
        images: [B, 3, H, W] in [0, 1].
        generator: random generator, on their device.
    """

    def chance(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=images.device) * (high - low) + low

    groups = []
    for group in images.chunk(8):  # one size and blur each, since both are done to many images at once
        kind, size, sigma = chance(3).tolist()
        if kind < 0.4:
            small = F.interpolate(group, size=int(52 + size * 70), mode="bilinear", antialias=True)
            group = F.interpolate(small, size=group.shape[-2:], mode="bicubic")
        elif kind < 0.7:
            group = _blurred(group, 0.3 + 0.9 * sigma)
        groups.append(group)
    out = torch.cat(groups)
    number = len(out)
    gain, shift = chance(number, 3, 1, 1, low=0.92, high=1.08), chance(number, 3, 1, 1, low=-0.04, high=0.04)
    noise = torch.randn(out.shape, generator=generator, device=out.device)
    coarse = torch.randn(number, 3, 16, 16, generator=generator, device=out.device)
    noise = noise + F.interpolate(coarse, size=out.shape[-2:], mode="bilinear")
    strength = chance(number, 1, 1, 1, high=0.05) * (chance(number, 1, 1, 1) < 0.6)
    return (out * gain + shift + noise * strength).clamp(0, 1)


def _blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    x = torch.arange(-4, 5, device=images.device, dtype=images.dtype)
    bell = torch.exp(-(x**2) / (2 * sigma**2))
    bell = (bell / bell.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, bell, groups=3), bell.transpose(2, 3), groups=3)


def loss(outputs: torch.Tensor, geometry: torch.Tensor, traits: torch.Tensor) -> dict[str, torch.Tensor]:
    """CenterNet's focal loss on the centres (its equation 1), L1 on shifts and boxes, cross entropy on each trait.

    Args:
        outputs: of the net.
        geometry: [B, N, 4], see `SceneBatches`.
        traits: [B, N, 6], see `SceneBatches`.

    Returns:
        Scalars by name; train on their sum.
    """
    centers, shifts, sides, logits = split(outputs.float())
    real = traits[..., 0] >= 0
    image, number = real.nonzero(as_tuple=True)
    place, size = geometry[image, number], traits[image, number, 0]
    at = place[:, :2] * MAP
    column, row = at.long().clamp(0, MAP - 1).unbind(-1)
    wanted = _bumps(centers, at, image, size)
    wanted[image, size, row, column] = 1.0
    chance = centers.sigmoid()
    hit = wanted == 1
    focal = torch.where(
        hit,
        (1 - chance) ** 2 * F.logsigmoid(centers),
        (1 - wanted) ** 4 * chance**2 * F.logsigmoid(-centers),
    )
    found = {"center": -focal.sum() / len(image)}
    shift = at - torch.stack([column, row], -1)
    found["shift"] = F.l1_loss(shifts[image, size, :, row, column], shift)
    found["box"] = 5 * F.l1_loss(sides[image, size, :, row, column], place[:, 2:])
    for i, (name, values) in enumerate(logits.items()):
        found[name] = F.cross_entropy(values[image, size, :, row, column], traits[image, number, 1 + i])
    return found


def _bumps(
    centers: torch.Tensor, at: torch.Tensor, image: torch.Tensor, size: torch.Tensor, sigma: float = 0.7
) -> torch.Tensor:
    """A bell around every object, the highest where bells meet; like `centers`, [B, 2, 16, 16]."""
    grid = torch.arange(MAP, device=at.device) + 0.5
    bell = torch.exp(-((grid - at[:, None, :].transpose(1, 2)) ** 2) / (2 * sigma**2))  # [objects, 2, 16]
    each = bell[:, 1, :, None] * bell[:, 0, None, :]
    out = torch.zeros_like(centers).flatten(0, 1)
    index = (image * len(SIZES) + size)[:, None, None].expand(-1, MAP, MAP)
    return out.scatter_reduce(0, index, each, "amax").view_as(centers)


def _rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short rise, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))


def train(
    steps: int,
    batch: int,
    device: str,
    report: Callable[[int, dict[str, torch.Tensor]], None],
    workers: int = 0,
    seed: int = 0,
    peak: float = 2e-3,
    start: Path | None = None,
) -> DetectorNet:
    """Train a detector.

    Args:
        steps: how many.
        batch: scenes a step.
        device: "cpu" or "cuda"; there the forward pass is in bfloat16, weights in float32.
        report: called after each step with its number from 1 and the losses by name, still on the device.
        workers: processes that draw.
        seed: of weights, scenes and noise.
        peak: learning rate.
        start: weights to go on from; None: from nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DetectorNet() if start is None else Detector.load(start).net
        # torch's stubs of Module.to have memory_format only beside a tensor
        net = net.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak)
    generator = torch.Generator(device).manual_seed(seed)
    many = {"prefetch_factor": 4, "multiprocessing_context": "spawn"} if workers else {}
    scenes = DataLoader(
        SceneBatches(steps, batch, seed), batch_size=None, num_workers=workers, pin_memory=device != "cpu", **many
    )
    for step, tensors in enumerate(scenes):
        images, geometry, traits = (tensor.to(device, non_blocking=True) for tensor in tensors)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, peak)
        inputs = spoil(images.float() / 255, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            outputs = net(inputs)
        losses = loss(outputs, geometry, traits)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        report(step + 1, {name: value.detach() for name, value in losses.items()})
    return net


def save(net: DetectorNet, path: Path) -> None:
    """Write weights, kernels in half precision; written aside, then renamed."""
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    state = {name: value.half() if value.ndim > 1 else value for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".incomplete")
    save_file(state, aside)
    os.replace(aside, path)


def paired(scene: Scene, seen: list[Detection]) -> list[tuple[SceneObject, Detection]]:
    """Assign to each object the nearest detected one within `NEAR`, nearest pairs and equal sizes first."""
    middles = [middle(box)[:2] for box in boxes(scene, PIXELS)]
    pairs = []
    for i, (x, y) in enumerate(middles):
        for j, one in enumerate(seen):
            distance = float(np.hypot(one.center[0] - x, one.center[1] - y))
            if distance <= NEAR:
                pairs.append((one.size != scene.objects[i].size, distance, i, j))
    found, used = {}, set()
    for _, _, i, j in sorted(pairs):
        if i not in found and j not in used:
            found[i] = j
            used.add(j)
    return [(scene.objects[i], seen[j]) for i, j in found.items()]


def evaluate(detector: Detector, scenes: int = 1000, seed: int = 1, part: Split = "test", size: int = PIXELS) -> dict:
    """Accuracies on clean images.

    Args:
        detector: what is measured.
        scenes: how many, of 1 to 5 objects.
        seed: of the scenes.
        part: the split that they are from.
        size: of the images drawn, in pixels.

    Returns:
        Shares in [0, 1]: precision and recall of objects; of those found, how many have the right kind, colour, both,
        texture, part, glyph, size and cell; `glyph_read` of those that have a glyph, `part_worn` of those that wear
        something; `kind_color_cell`, `_inside` and `_behind` of those that stand free, before another object and half
        hidden by one; `kind_color_of_all` counts what was not found as wrong. And the numbers of scenes and objects.
    """
    drawn = [random_scene(scene_rng(seed, part, i), split=part) for i in range(scenes)]
    read = detector.detect([draw(scene, size) for scene in drawn])
    count: Counter[str] = Counter()
    for scene, seen in zip(drawn, read, strict=True):
        count["objects"] += len(scene.objects)
        count["seen"] += len(seen)
        for obj, one in paired(scene, seen):
            right = {name: getattr(obj.attributes, name) == getattr(one.attributes, name) for name in TRAITS}
            right |= {"size": obj.size == one.size, "cell": obj.cell == one.cell, "found": True}
            right["kind_color"] = right["kind"] and right["color"]
            count[f"{obj.place} asked"] += 1
            count[f"kind_color_{obj.place}"] += right["kind_color"]
            count.update(name for name, good in right.items() if good)
            for name, trait, none in (("glyph_read", "glyph", ""), ("part_worn", "part", "none")):
                if getattr(obj.attributes, trait) != none:
                    count[f"{name} asked"] += 1
                    count[name] += right[trait]
    names = (*TRAITS, "kind_color", "size", "cell")
    found = {name: count[name] / max(1, count["found"]) for name in names}
    found |= {name: count[name] / max(1, count[f"{name} asked"]) for name in ("glyph_read", "part_worn")}
    found |= {f"kind_color_{p}": count[f"kind_color_{p}"] / max(1, count[f"{p} asked"]) for p in get_args(Place)}
    found["kind_color_of_all"] = count["kind_color"] / max(1, count["objects"])
    found |= {"precision": count["found"] / max(1, count["seen"]), "recall": count["found"] / max(1, count["objects"])}
    return {"scenes": scenes, "objects": count["objects"]} | {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256, help="scenes a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(0, len(os.sched_getaffinity(0)) - 1), help="that draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="weights to write, or to evaluate")
    parser.add_argument("--evaluate", action="store_true", help="measure on held-out scenes, print JSON, and stop")
    parser.add_argument("--scenes", type=int, default=1000, help="to evaluate on")
    parser.add_argument("--size", type=int, default=PIXELS, help="of the images to evaluate on, in pixels")
    options = parser.parse_args()
    if options.evaluate:
        detector = Detector.load(options.output, options.device)
        print(json.dumps(evaluate(detector, options.scenes, size=options.size), indent=2))
        return
    began = time.perf_counter()

    def report(step: int, losses: dict[str, torch.Tensor]) -> None:
        if step % 100 == 0 or step == options.steps:
            rate = step * options.batch / (time.perf_counter() - began)
            values = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
            print(f"step {step:5}  {rate:6.0f} images/s  {values}", flush=True)

    net = train(options.steps, options.batch, options.device, report, options.workers, options.seed,
                options.peak, options.start)  # fmt: skip
    save(net, options.output)
    print(json.dumps(evaluate(Detector(net), options.scenes), indent=2))


if __name__ == "__main__":
    main()

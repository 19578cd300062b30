"""Fine-tuning of the small model on seven tasks of a world that it never saw: zero-shot, with LoRA, and fully.

python benchmarks/finetune_tasks.py OUT --gpus 2 --processes 8 --minutes 9        # write the data, run, report
python benchmarks/finetune_tasks.py OUT --device cpu --processes 1 --steps 4 --samples 4 --only vqav2    # to see it run
python benchmarks/finetune_tasks.py OUT --report                                 # only make the tables again

OUT gets `data/`, a folder for each run, `results.json` and `results.md`. The same command goes on where it stopped: a
run that has a result is not repeated. Processes take runs from one list, each process one after the other; none is
begun that would not end within the given minutes, as far as a run of the same task has shown how long it takes. The
data are `mmi toyworld write --world shifted`, scored on its split `val`.

Words that the base model never wrote start with a loss of 13 to 20 a token, and Adam moves a weight by at most the rate
in a step, so 100 steps at 6e-4 do not reach them. Objects that no earlier image had are learned later: after 400 steps
of 36 questions, grounds and counts are known, and objects are not. The layers between the language model and the UNet
keep a low rate: at a high one they make all conditions alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).resolve()
ROWS = 4  # of a batch: some 36 samples
RANK = 32  # of adapters: one of 16 has fewer dimensions than the task has new words
BATCH = 256  # samples of an evaluation at a time
SEEDS = (0, 1)
METHODS = ("full", "lora", "replay", "zero")
FORGETTING = ("coco", "vqav2")  # tasks of the first world on which a tuned model is examined
REPLAYED = ("vqav2", "coco")  # tasks that are also trained with documents of the first world
BASE, SHIFTED = "base", "shifted"


@dataclass(frozen=True)
class Trial:
    """A task, how it is trained, and how it is examined.

    Attributes:
        recipe: of the package.
        form: format of the data; `images` is the folder of its images.
        train, val: phases.
        value: what is compared in the shifted world; `own` in the first one.
        generation: how a model answers.
        steps, samples: of training, and of an evaluation, in units of the arguments.
        draws: whether it learns images.
    """

    recipe: str
    form: str
    images: str
    train: str
    val: str
    value: str
    own: str
    generation: dict[str, Any]
    steps: float = 1.0
    samples: float = 1.0

    @property
    def draws(self) -> bool:
        return self.value == FOUND


WRITE = {"max_new_tokens": 80, "min_new_tokens": 1, "num_beams": 1}
ANSWER = {"max_new_tokens": 16, "min_new_tokens": 0, "num_beams": 1}
BOX = {"max_new_tokens": 30, "min_new_tokens": 1, "num_beams": 1}
DRAW = {"num_inference_steps": 20, "num_candidates": 1}  # with the guidance that the model has for its own world
FOUND = "found_kind_color"
TRIALS = {
    "coco_karpathy": Trial("caption", "coco", "", "train", "val", "objects_f1", "facts_right", WRITE),
    "vqav2": Trial("vqa", "vqav2", "", "train", "val", "accuracy", "accuracy", ANSWER),
    "refcoco": Trial("grounding", "refcoco", "train2014", "train", "val", "accuracy", "accuracy", BOX),
    "coco": Trial("text-to-image", "coco", "", "train", "val", FOUND, FOUND, DRAW, 1.0, 0.5),
    "ade20k": Trial("segmentation-to-image", "ade20k", "", "training", "validation", FOUND, FOUND, DRAW, 1.0, 0.5),
    "vist": Trial("vist", "vist", "images", "train", "val", FOUND, FOUND, DRAW, 0.7, 0.25),
    "visdial": Trial("visdial", "visdial", "", "train", "val", "mrr", "mrr", ANSWER, 1.0, 0.2),
}


@dataclass(frozen=True)
class Run:
    """One entry of the list: a task, how the model is trained for it ("zero": not at all), and with which seed."""

    task: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-{self.method}-{self.seed}"


def all_runs(options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, of `every_run`."""
    tasks, methods, seeds = options.only or TRIALS, options.methods, options.seeds
    return [run for run in every_run() if run.task in tasks and run.method in methods and run.seed in seeds]


def every_run() -> list[Run]:
    """All runs, a seed after the other, the longest first; those without training are short."""
    tasks = sorted(TRIALS, key=lambda task: not TRIALS[task].draws)
    trained = {seed: [Run(task, method, seed) for task in tasks for method in ("full", "lora")] for seed in SEEDS}
    first, *others = trained.values()
    first += [Run(task, "replay") for task in tasks if task in REPLAYED] + [Run(task, "zero") for task in tasks]
    return first + [run for runs in others for run in runs]


# ---- data


def write_data(out: Path, options: argparse.Namespace) -> None:
    """Write the data sets that are missing, each in a process."""
    names = [name for name in TRIALS if not options.only or name in options.only]
    shifted = sorted({TRIALS[name].form for name in names})
    wanted = [(SHIFTED, form, split, count) for form in shifted
              for split, count in (("train", options.images), ("val", options.samples))]  # fmt: skip
    wanted += [(BASE, form, "val", options.samples)
               for form in sorted({*shifted, *(TRIALS[name].form for name in FORGETTING)})]  # fmt: skip
    wanted.sort(key=lambda entry: entry[1] != "vist")  # has most images
    missing = [(out / "data", *entry) for entry in wanted if not data_folder(out, *entry[:3]).is_dir()]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, max(len(missing), 1)), get_context("spawn")) as pool:
        for done in [pool.submit(write_one, *entry) for entry in missing]:
            done.result()


def write_one(data: Path, world: str, form: str, split: Any, count: int) -> None:
    """Write a data set."""
    from toyworld.writers import write_dataset
    from toyworld.writers.base import Job

    data.mkdir(parents=True, exist_ok=True)
    (data / world).mkdir(exist_ok=True)
    number = max(2, count // 4) if form == "vist" else count  # a story has five images
    write_dataset(form, data_folder(data.parent, world, form, split), Job(number, split, 0, 128, world))


def data_folder(out: Path, world: str, form: str, split: str) -> Path:
    """The folder of a data set."""
    return out / "data" / world / f"{form}-{split}"


def paths(out: Path, task: str, world: str, split: str) -> dict[str, str]:
    """Where a task finds its files."""
    trial = TRIALS[task]
    folder = data_folder(out, world, trial.form, split)
    return {"annotations": str(folder), "images": str(folder / trial.images)}


# ---- one run


def examine(out: Path, loaded: Any, task: str, world: str, folder: Path, limit: int) -> dict[str, Any]:
    """The value of a model in a task, with its bootstrap interval."""
    from mm_interleaved.evaluation import TaskSuite, evaluate
    from mm_interleaved.tasks import TaskConfig

    trial = TRIALS[task]
    count = max(2, round(trial.samples * limit))
    guidance = loaded.model.config.image_decoder.guidance_scale
    generation = trial.generation | ({"guidance_scale": guidance} if trial.draws and guidance is not None else {})
    config = TaskConfig(task, phase=trial.val, limit=count, generation=generation, **paths(out, task, world, "val"))
    begin = time.perf_counter()
    suite = TaskSuite([config], batch_size=BATCH)
    results = evaluate(suite, loaded.model, loaded.processor, folder, name=folder.name, weights=folder.name)
    assert results is not None
    (result,) = results.tasks.values()
    name = trial.value if world == SHIFTED else trial.own
    for metric in result.metrics.values():
        if name in metric["values"]:
            return {"value": metric["values"][name], "interval": metric.get("intervals", {}).get(name), "name": name,
                    "samples": result.evaluated, "seconds": time.perf_counter() - begin}  # fmt: skip
    raise ValueError(f"{task} has no value '{name}': {result.failed or result.metrics}")


def settings_of(run: Run, out: Path, options: argparse.Namespace) -> list[str]:
    """What a run changes of its recipe, as `key=value`."""
    trial = TRIALS[run.task]
    steps = max(1, round(trial.steps * (options.draw_steps if trial.draws else options.steps)))
    source = {"type": "task", "name": run.task, "options": {"task": run.task, "phase": trial.train,
                                                            **paths(out, run.task, SHIFTED, "train")}}  # fmt: skip
    rate = options.draw_lr if trial.draws else options.lr
    groups = [
        {"pattern": r"^image_decoder\.unet", "lr": options.unet_lr},
        {"pattern": r"^(context_proj|image_decoder\.resampler)", "lr": options.conditions_lr},
    ] if trial.draws else [{"pattern": r"^visual_tokenizer", "lr": options.vision_lr}]  # fmt: skip
    lora_rate = options.draw_lora_lr if trial.draws else options.lora_lr
    changes = [
        f"steps={steps}", f"seed={run.seed}", f"data.seed={run.seed}", "save_every=0", "tensorboard=false",
        "evaluation=null", "sample_every=0", f"log_every={max(1, steps // 20)}",
        f"schedule.warmup_steps={max(1, steps // 20)}",
        f"data.sources={json.dumps([source])}", f"data.batch_size={options.rows}", "data.num_workers=1",
        "data.start_method=fork", "shapes.multiple=16",  # cuDNN plans convolutions anew for each number of images
        f"precision={'float32' if options.device == 'cpu' else 'bfloat16'}",
        *([f"optimizer.lr={lora_rate}", f"adapter.rank={RANK}"] if run.method == "lora" else
          [f"optimizer.lr={rate}", f"optimizer.groups={json.dumps(groups)}"]),
    ]  # fmt: skip
    if run.method == "replay":
        old = {"type": "toyworld", "name": "first-world", "options": {"size": 128}}
        changes.append(f"replay={json.dumps({'share': 0.25, 'sources': [old]})}")
    return changes


def do(run: Run, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and examine; returns the result."""
    import torch

    from mm_interleaved.pretrained import TOKENIZER, load
    from mm_interleaved.training.building import count_trained
    from mm_interleaved.training.recipes import load_recipe
    from mm_interleaved.training.run import train

    folder, on_gpu = out / "runs" / run.name, options.device != "cpu"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    device = torch.device("cuda" if on_gpu else "cpu")
    found: dict[str, Any] = asdict(run)
    started = time.perf_counter()
    if run.method == "zero":
        loaded = load("small", device=device)
    else:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        lora = "all" if run.method == "lora" else None
        config = load_recipe(TRIALS[run.task].recipe, "small", lora, str(folder), settings_of(run, out, options))
        begin = time.perf_counter()
        train(config, TOKENIZER, None if on_gpu else "cpu")
        found["seconds"] = time.perf_counter() - begin
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        found |= learned(folder) | {"trained_parameters": count_trained(config)[0].trainable}
        final = folder / "final"
        loaded = load("small", device=device, adapters=[final]) if lora else load(final, torch.float32, device)
    found["shifted"] = examine(out, loaded, run.task, SHIFTED, folder / "shifted", options.samples)
    if run.seed == 0:
        own = (run.task,) if run.method == "zero" else FORGETTING
        found["base"] = {t: examine(out, loaded, t, BASE, folder / f"base-{t}", options.samples // 2) for t in own}
    del loaded
    gc.collect()
    found["elapsed"] = time.perf_counter() - started
    return found


def learned(folder: Path) -> dict[str, Any]:
    """The steps and losses of a run, and the bytes of the weights that it hands over."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    size = sum(file.stat().st_size for file in (folder / "final").glob("*.safetensors"))
    return {"steps": entries[-1]["step"], "losses": losses, "saved_bytes": size}


# ---- many runs


def work(out: Path, options: argparse.Namespace, deadline: float) -> None:
    """Take runs from the list and do them until none is left or the time is over."""
    for run in all_runs(options):
        if not has_time(run, out, deadline):
            continue
        claim, result = out / "claims" / run.name, out / "results" / f"{run.name}.json"
        if result.is_file():
            continue
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        found = do(run, out, options)
        result.with_suffix(".part").write_text(json.dumps(found))
        result.with_suffix(".part").rename(result)


def has_time(run: Run, out: Path, deadline: float) -> bool:
    """Whether a run would end before the deadline, by what runs of its task took so far."""
    others = [other for other in every_run() if other.task == run.task and other.method != "zero"]
    done = [out / "results" / f"{other.name}.json" for other in others]
    took = [json.loads(path.read_text())["elapsed"] for path in done if path.is_file() and run.method != "zero"]
    return time.time() + max(took, default=0.0) < deadline


def run_all(out: Path, options: argparse.Namespace) -> None:
    """Start the processes, and start one anew that a failed run has ended."""
    deadline = time.time() + 60 * options.minutes
    shutil.rmtree(out / "claims", ignore_errors=True)
    for name in ("claims", "results", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    (out / "about.json").write_text(json.dumps(settings_and_machine(options)))
    begin = time.perf_counter()
    write_data(out, options)
    print(f"data written in {time.perf_counter() - begin:.0f} s", flush=True)
    command = [sys.executable, str(BENCHMARK), *sys.argv[1:], "--worker", str(deadline)]

    def keep(slot: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(slot % max(options.gpus, 1))}
        if options.device == "cpu":
            environment.pop("CUDA_VISIBLE_DEVICES")
        with (out / "logs" / f"{slot}.txt").open("w") as log:
            while subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
                if time.time() > deadline:
                    return

    slots = options.processes * max(options.gpus, 1)
    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(keep, range(slots)))


# ---- tables


def report(out: Path, options: argparse.Namespace) -> str:
    """Write `results.json` and `results.md`; returns the latter."""
    found = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    done = {Run(r["task"], r["method"], r["seed"]).name for r in found}
    missing = [run.name for run in all_runs(options) if run.name not in done]
    about = json.loads((out / "about.json").read_text()) if (out / "about.json").is_file() else {}
    about |= {"model_sha256": weights(), "seeds": SEEDS, "missing": missing}
    (out / "results.json").write_text(json.dumps({"about": about, "runs": found}, indent=1) + "\n")
    text = "\n".join([*tuned_table(found), "", *forgetting_table(found), ""])
    if missing:
        text += f"\nNot run: {', '.join(missing)}.\n"
    (out / "results.md").write_text(text)
    return text


def weights() -> str:
    """SHA-256 of the small model's files with weights."""
    import hashlib

    from mm_interleaved.pretrained import FOLDER

    digest = hashlib.sha256()
    for path in sorted((FOLDER / "small").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def settings_and_machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the runs of a command have in common, and where they ran."""
    import torch
    import transformers

    kept = ("steps", "draw_steps", "rows", "lr", "vision_lr", "draw_lr", "conditions_lr", "unet_lr", "lora_lr",
            "draw_lora_lr", "images", "samples", "device", "processes")  # fmt: skip
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"command": ["python", f"benchmarks/{BENCHMARK.name}", "OUT", *sys.argv[2:]], "gpus": names,
            "torch": torch.__version__, "transformers": transformers.__version__,
            **{name: getattr(options, name) for name in kept}}  # fmt: skip


def tuned_table(found: list[dict[str, Any]]) -> list[str]:
    """For each task the three ways side by side."""
    rows = ["| task | value | own world, base | zero-shot | LoRA, two seeds | full, two seeds | trained: LoRA, full | "
            "seconds | GiB | MB: LoRA, full |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for task, trial in TRIALS.items():
        of = {method: [r for r in found if (r["task"], r["method"]) == (task, method)]
              for method in ("zero", "lora", "full")}  # fmt: skip
        if not any(of.values()):
            continue
        both = [of["lora"][:1], of["full"][:1]]
        rows.append("| " + " | ".join([
            task, trial.value, ", ".join(_shown(r["base"][task]) for r in of["zero"] if task in r.get("base", {})),
            *("; ".join(_shown(r["shifted"]) for r in of[method]) or "-" for method in ("zero", "lora", "full")),
            ", ".join(f"{r['trained_parameters'] / 1e6:.2f} M" for rs in both for r in rs),
            ", ".join(f"{r['seconds']:.0f}" for rs in both for r in rs),
            ", ".join(f"{r['memory_gib']:.1f}" for rs in both for r in rs if r["memory_gib"] is not None) or "-",
            ", ".join(f"{r['saved_bytes'] / 1e6:.1f}" for rs in both for r in rs),
        ]) + " |")  # fmt: skip
    return rows


def forgetting_table(found: list[dict[str, Any]]) -> list[str]:
    """What tuned models still can in the first world."""
    before = {r["task"]: r["base"][r["task"]] for r in found if r["method"] == "zero" and "base" in r}
    untrained = (_shown(before[task]) if task in before else "-" for task in FORGETTING)
    rows = [
        f"| trained on | how | {' | '.join(f'first world: {task}' for task in FORGETTING)} |",
        "|---|---|" + "---|" * len(FORGETTING),
        f"| nothing | - | {' | '.join(untrained)} |",
    ]
    for r in found:
        if r["method"] != "zero" and "base" in r:
            rows.append(f"| {r['task']} | {r['method']} | {' | '.join(_shown(r['base'][t]) for t in FORGETTING)} |")
    return rows


def _shown(result: dict[str, Any]) -> str:
    low_high = result["interval"]
    return f"{result['value']:.1f}" + (f" ({low_high[0]:.1f} to {low_high[1]:.1f})" if low_high else "")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--processes", type=int, default=8, help="of each GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="in which all runs should end")
    parser.add_argument(
        "--steps",
        type=int,
        default=2400,
        help="of a task of words; most of their loss is gone after 100, but what an "
        "image shows is learned long after that",
    )
    parser.add_argument(
        "--draw-steps", type=int, default=1400, help="of a task of images; stories have 0.7 times as many"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch")
    parser.add_argument("--lr", type=float, default=1e-3, help="trained fully, for tasks of words")
    parser.add_argument(
        "--draw-lr", type=float, default=6e-4, help="the same for tasks of images, but for their parts:"
    )
    parser.add_argument("--vision-lr", type=float, default=4e-4, help="of the image encoder, for tasks of words")
    parser.add_argument("--unet-lr", type=float, default=1e-3, help="of the UNet, trained fully")
    parser.add_argument("--conditions-lr", type=float, default=2e-4, help="of the layers before the UNet")
    parser.add_argument("--lora-lr", type=float, default=1.5e-3, help="of adapters for tasks of words")
    parser.add_argument("--draw-lora-lr", type=float, default=1e-3, help="of adapters for tasks of images")
    parser.add_argument("--images", type=int, default=8000, help="for training, of each format")
    parser.add_argument("--samples", type=int, default=200, help="for an evaluation, of tasks about text")
    parser.add_argument("--only", nargs="*", default=[], choices=tuple(TRIALS))
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true", help="only make the tables again")
    parser.add_argument("--worker", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    if options.worker:
        work(out, options, options.worker)
        return
    if not options.report:
        run_all(out, options)
    print(report(out, options))


if __name__ == "__main__":
    main()

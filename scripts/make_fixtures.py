"""Write what a version of this package leaves behind, for the tests of later versions (`tests/fixtures`).

python scripts/make_fixtures.py tests/fixtures/v0
python scripts/make_fixtures.py tests --only demo       (with new weights: `tests/demo`)

    checkpoint/   a model smaller than the debug preset, its processor, and the logits of one document
    run.tar.xz    a run of `mmi train` that stopped after 4 of 6 steps, and the losses of the whole run
    results/      a folder of `mmi evaluate`, with its data
    demo/         the texts and images of `make demo`
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mm_interleaved import MMInterleaved, MMInterleavedConfig, MMInterleavedProcessor, MMInterleavedTokenizer
from mm_interleaved.document import Document, Image, Text
from mm_interleaved.pretrained import TOKENIZER
from toyworld.writers import write_dataset
from toyworld.writers.base import Job

ROOT = Path(__file__).parents[1]
STEPS, STOPPED = 6, 4
RUN = [
    "model.init_from.preset=null", f"steps={STEPS}", f"save_every={STOPPED}", "log_every=1", "eval_every=0",
    "eval_data=null", "sample_every=0", "tensorboard=false", "optimizer.lr=1e-3", "ema.decay=0",
]  # fmt: skip  # with configs/debug.yaml
TRAINED = r"^(?!.*(synchronizer|visual_tokenizer\.resampler|context_proj))"  # all else is frozen: Adam's state is small
EVALUATION = """\
model: checkpoint
output: results
batch_size: 2
dtype: float32
tasks:
  - &task
    task: coco_karpathy
    images: data
    annotations: data
    phase: val
    limit: 4
    generation: {num_beams: 2, max_new_tokens: 6, min_new_tokens: 1, num_inference_steps: 2, num_candidates: 1}
  - {<<: *task, task: coco, limit: 2}
"""


def tiny_model() -> MMInterleaved:
    """A model of a tenth of a million parameters beside its vocabulary, none of them zero."""
    config = MMInterleavedConfig.preset("debug").to_dict()
    config["text_config"] |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    decoder = config["image_decoder"]
    decoder["unet"] |= {
        "block_out_channels": [8, 8, 8], "attention_head_dim": [2, 2, 2], "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }  # fmt: skip
    decoder["vae"] |= {"block_out_channels": [4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1}
    decoder["resampler"] |= {"hidden_size": 16, "intermediate_size": 16}
    torch.manual_seed(20)
    model = MMInterleaved(MMInterleavedConfig.from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
            parameter.copy_(parameter.bfloat16())  # a file in float32 compresses to half its size
    return model.eval()


def document() -> Document:
    """What the stored logits belong to."""
    images = ROOT / "examples/images"
    return Document([Text("A fox."), Image(images / "fox.png"), Text("A house."), Image(images / "house.png"),
                     Text("The fox lives there.")])  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """The checkpoint in bfloat16, and the logits that it gives in float32."""
    model = tiny_model()
    processor = MMInterleavedProcessor.for_model(model.config, MMInterleavedTokenizer.from_vocab(TOKENIZER))
    batch = processor([document()])
    with torch.no_grad():
        logits = model(batch.input_ids, batch.attention_mask, pixel_values=batch.pixel_values).logits
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({"input_ids": batch.input_ids, "logits": logits[..., ::25].contiguous()}, folder / "expected.safetensors")


def mmi(*arguments: object, cwd: Path) -> None:
    """Run a command; its messages are not kept."""
    subprocess.run([sys.executable, "-m", "mm_interleaved.cli", *map(str, arguments)], cwd=cwd, check=True)


def make_run(checkpoint: Path, target: Path) -> None:
    """A whole run, and what was there after its first checkpoint, packed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(checkpoint, folder / "checkpoint")
        shutil.copytree(ROOT / "examples", folder / "examples")
        frozen = f"model.overrides.frozen=['{TRAINED}']"
        settings = [
            "train",
            "--device",
            "cpu",
            ROOT / "configs/debug.yaml",
            "output=run",
            "model.init_from.checkpoint=checkpoint",
        ]
        mmi(*settings, *RUN, frozen, cwd=folder)
        log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
        losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
        (folder / "run/expected.json").write_text(json.dumps({"losses": losses}) + "\n")
        for path in (folder / "run").iterdir():
            if path.name == "final" or path.name == f"checkpoint-{STEPS}":
                shutil.rmtree(path)
        (folder / "run/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log if e["step"] <= STOPPED))
        shutil.make_archive(str(target.parent / "run"), "xztar", folder, "run")


def make_results(folder: Path) -> None:
    """Captions of four images, and two images from captions."""
    write_dataset("coco", folder / "data", Job(4, "val", 0, 64))
    (folder / "evaluate.yaml").write_text(EVALUATION)
    shutil.copytree(folder.parent / "checkpoint", folder / "checkpoint")
    mmi("evaluate", "evaluate.yaml", "--device", "cpu", cwd=folder)
    shutil.rmtree(folder / "checkpoint")
    for page in folder.glob("results/*/gallery*"):
        shutil.rmtree(page) if page.is_dir() else page.unlink()


def make_demo(folder: Path) -> None:
    """As `make demo`, on the CPU."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(ROOT / "examples", Path(name, "examples"))
        mmi("generate", "examples/demo.json", "--output", "demo", "--seed", 7, "--device", "cpu", cwd=Path(name))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in sorted(Path(name, "demo").rglob("*")):
            if path.suffix == ".png" or path.name == "results.json":
                (folder / path.relative_to(f"{name}/demo")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / path.relative_to(f"{name}/demo"))


def main() -> None:
    """Write all or some of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=["checkpoint", "run", "results", "demo"])
    options = parser.parse_args()
    folder, wanted = options.folder.resolve(), options.only or ["checkpoint", "run", "results", "demo"]
    folder.mkdir(parents=True, exist_ok=True)
    if "checkpoint" in wanted:
        make_checkpoint(folder / "checkpoint")
    if "run" in wanted:
        make_run(folder / "checkpoint", folder / "run.tar.xz")
    if "results" in wanted:
        make_results(folder / "results")
    if "demo" in wanted:
        make_demo(folder / "demo")


if __name__ == "__main__":
    main()

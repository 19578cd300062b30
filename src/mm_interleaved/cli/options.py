"""Options that several commands have: one definition, one name and one help text for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DTYPES = ("float32", "bfloat16", "float16")

# ---- the model, and how it is loaded (`models.ModelOptions`)

ModelName = Annotated[str, typer.Option("--model", "-m", help="small, debug, or the folder of a checkpoint.")]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="Folder of an adapter for the model; several are added up.")
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept an adapter that was trained on another model.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")]
QuantizationName = Annotated[
    str | None,
    typer.Option(
        "--quantization", help="Quantize the language model to 8 or 4 bits (not lossless): int8, fp8, int4, nf4."
    ),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Copy each large part of the model to the GPU only while it is needed.")
]

# ---- documents, and how they are generated

GenerationChanges = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE...",
        help="Settings of generation, such as max_turns=4 max_new_tokens=60 num_inference_steps=20.",
    ),
]
TextPreset = Annotated[
    str, typer.Option("--preset", help="How text is generated: default, caption, vqa, paragraph, interleaved.")
]
ImagePreset = Annotated[str, typer.Option(help="How images are generated: ddpm-30, dpm-solver-20, unipc-20.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that images may come from; default: the input's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of texts and images; the original's images have 42.")]

# ---- a run of a YAML file, of one process or of several

FileChanges = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, which replace those of the file.")
]
LoraPreset = Annotated[str | None, typer.Option("--lora", help="Train an adapter: llm, image, both, mmfs or all.")]
ProcessDevice = Annotated[str | None, typer.Option("--device", help="cpu, or by default a GPU if there is one.")]

"""`mmi chat`: writes and shows a document together with a model, in the terminal."""

from __future__ import annotations

import base64
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..io import InputError, UserError, atomic_folder, close_name, encode_image, write_atomic
from .console import console
from .errors import UsageError
from .models import ModelOptions, note_random_weights
from .options import Device, Dtype, GenerationChanges, ModelName, Offload, QuantizationName

if TYPE_CHECKING:
    import PIL.Image

    from ..document import Document, Segment
    from ..generation import ContinuousGenerator, GenerationSettings

HELP = """Write text and press Enter; the model answers with text and images.
  /image PATH   add an image           /draw    let the model answer with an image
  /reset        begin a new document   /save FOLDER   write the document and its images
  /help         this text              /quit    end (or Ctrl+D); Ctrl+C stops an answer"""
COMMANDS = ("/image", "/draw", "/reset", "/save", "/help", "/quit")


def chat(
    settings: GenerationChanges = None,
    *,
    model: ModelName = "small",
    output_folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for generated images.")] = Path("chat"),
    seed: Annotated[int, typer.Option(help="Seed of texts and images.", min=0)] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    quantization: QuantizationName = None,
    offload: Offload = False,
    inline: Annotated[
        bool | None, typer.Option("--inline/--paths", help="Show images in the terminal; default: if it can.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Use the model's chat template; default: one document.")
    ] = False,
) -> None:
    """Write a document together with a model: it streams text, and shows images or names their files."""
    from ..configuration import read_overrides
    from ..generation import ContinuousGenerator
    from ..generation.settings import TEXT_PRESETS, GenerationSettings, override

    loaded = ModelOptions(model, device, dtype, quantization, offload=offload).load()
    try:
        chosen = override(GenerationSettings(TEXT_PRESETS["interleaved"], vary_noise=True), seed=seed,
                          **read_overrides(settings or []))  # fmt: skip
        generator = ContinuousGenerator(loaded.model, loaded.processor, rows=1)
        loaded.model.image_decoder.sampler(loaded.model.image_decoder.settled(chosen.image))
    except InputError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    shown = _protocol() if inline is None else (_protocol() or "iterm") if inline else None
    session = Session(generator, chosen, output_folder, shown, role="user" if chat_template else None)
    note_random_weights(loaded)
    console.print(HELP, markup=False, highlight=False)
    for line in _lines():
        try:
            if not session.take(line):
                break
        except UserError as error:  # the session goes on
            console.print(f"[bold red]error:[/] {str(error).replace('[', chr(92) + '[')}", highlight=False)


def _lines() -> Iterator[str]:
    """What the user types, until the end of the input."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("(/quit or Ctrl+D ends)")


@dataclass
class Session:
    """A document that a user and a model write.

    Attributes:
        generator: the model, with one row.
        settings: settings of generation; the seed counts up with the answers.
        folder: where generated images are written.
        inline: the terminal's protocol for images; None: paths are shown.
        role: "user" with a chat template; None: the document has no roles.
        segments: the document so far.
        images, answers: numbers of generated images and of answers.
    """

    generator: ContinuousGenerator
    settings: GenerationSettings
    folder: Path
    inline: str | None
    role: str | None
    segments: list[Segment] = field(default_factory=list)
    images: int = 0
    answers: int = 0

    def take(self, line: str) -> bool:
        """Handle a line; whether the session goes on.

        Raises:
            UserError: the line cannot be used.
        """
        from ..document import Text

        text = line.strip()
        if not text.startswith("/"):
            if text:
                self.segments.append(Text(text, role=self.role))
                self._answer(draw=False)
            return True
        name, _, rest = text.partition(" ")
        actions: dict[str, Callable[[str], None]] = {
            "/image": self._add_image, "/draw": self._draw, "/reset": self._reset, "/save": self._save,
            "/help": lambda _: console.print(HELP, markup=False, highlight=False),
        }  # fmt: skip
        if name == "/quit":
            return False
        if name not in actions:
            raise UsageError(f"unknown command '{name}'", fix=close_name(name, COMMANDS) or "See /help")
        actions[name](rest.strip())
        return True

    def _add_image(self, rest: str) -> None:
        from ..document import Image
        from ..io.images import load_image

        if not rest:
            raise UsageError("/image needs the path of a file")
        try:
            path = shlex.split(rest)[0]
        except ValueError:
            path = rest
        self.segments.append(Image(load_image(Path(path).expanduser()), role=self.role))
        console.print(f"(added {path})", markup=False, highlight=False)

    def _draw(self, rest: str) -> None:
        from ..document import Text

        if rest:
            self.segments.append(Text(rest, role=self.role))
        if not self.segments:
            raise UsageError("there is nothing to draw yet; write a text first")
        self._answer(draw=True)

    def _reset(self, rest: str) -> None:
        self.segments.clear()
        console.print("(a new document)")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a folder")
        folder = Path(rest).expanduser()
        with atomic_folder(folder, replace=False) as aside:
            self._write(aside)
        console.print(f"(saved in {folder})", markup=False, highlight=False)

    def _write(self, folder: Path) -> None:
        from dataclasses import replace

        import PIL.Image

        from ..document import Document, Image
        from ..io import write_json

        written: list[Segment] = []
        for number, segment in enumerate(self.segments):
            if isinstance(segment, Image) and isinstance(segment.source, PIL.Image.Image):
                name = f"{number:03d}.png"
                write_atomic(folder / name, encode_image(segment.source, "png"))
                segment = replace(segment, source=name, generated=None)
            written.append(segment)
        write_json(folder / "document.json", Document(written).to_dict())

    # ---- answers

    def _document(self, draw: bool) -> Document:
        from ..document import Document, Image

        role = "assistant" if self.role else None
        slot: list[Segment] = [Image(role=role)] if draw else []
        return Document([*self.segments, *slot])

    def _answer(self, draw: bool) -> None:
        """Generate, and show text and images while they come; Ctrl+C keeps what is finished."""
        from dataclasses import replace

        from ..generation import DocumentFinished, ImageProgress, SegmentFinished, TextDelta

        before, generator, key = len(self.segments), self.generator, self.answers
        image = replace(self.settings.image, seed=self.settings.image.seed + key)
        settings = replace(self.settings, seed=self.settings.seed + key, image=image)
        self.answers += 1
        try:
            generator.join(key, generator.prepare(self._document(draw), "the document"), settings)
            while generator.running:
                for _, event in generator.step():
                    if isinstance(event, TextDelta):
                        print(event.text, end="", flush=True)
                    elif isinstance(event, ImageProgress):
                        _show_progress(event.step, event.total)
                    elif isinstance(event, SegmentFinished):
                        self._finished(event.segment, settings.text.num_beams > 1)
                    elif isinstance(event, DocumentFinished):
                        print(flush=True)
        except KeyboardInterrupt:
            generator.leave(key)
            console.print("(stopped)")
        except InputError:
            del self.segments[before:]
            raise

    def _finished(self, segment: Segment, whole: bool) -> None:
        from dataclasses import replace

        import PIL.Image

        from ..document import Text

        self.segments.append(replace(segment, role="assistant" if self.role else None))
        if isinstance(segment, Text):
            print(segment.text if whole else "", end="", flush=True)
            return
        assert isinstance(segment.source, PIL.Image.Image)  # it was just generated
        self.images += 1
        path = self.folder / f"{self.images:03d}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, encode_image(segment.source, "png"))
        print("\r\x1b[K" if sys.stdout.isatty() else "", end="")
        if self.inline:
            print(inline_image(segment.source, self.inline), flush=True)
        else:
            print(f"[{path}]", flush=True)


def _show_progress(step: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\r\x1b[K(image: {step} of {total})", end="", flush=True)


def _protocol() -> str | None:
    """The protocol by which this terminal shows images; None: it is not known to show any."""
    if not sys.stdout.isatty():
        return None
    if os.environ.get("KITTY_WINDOW_ID") or os.environ.get("TERM_PROGRAM") == "ghostty":
        return "kitty"
    return "iterm" if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm", "vscode") else None


def inline_image(image: PIL.Image.Image, protocol: str) -> str:
    """The control sequence that shows an image.

    Args:
        image: the image.
        protocol: `iterm` (iTerm2's inline images) or `kitty` (the Kitty graphics protocol).
    """
    file = BytesIO()
    image.save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(file.getvalue())};width={image.width}px:{data}\a"
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    heads = [f"a=T,f=100,m={int(len(pieces) > 1)}", *(f"m={int(i + 2 < len(pieces))}" for i in range(len(pieces) - 1))]
    return "".join(f"\x1b_G{head};{piece}\x1b\\" for head, piece in zip(heads, pieces, strict=True))

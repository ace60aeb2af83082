"""`sightline compress` and `sightline decompress`: pictures to coded files and back, without a service."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.codecs import Decoders, find_named
from cli.files import BITSTREAM_SUFFIX, PICTURE_SUFFIXES, Job, expand, make_folder, plan, write_atomically
from cli.pictures import MADE_BY, encode_png, read_frame
from cli.progress import for_each

if TYPE_CHECKING:
    from shared.codec.types import Bitstream

DEFAULT_QUALITY = 4.0

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results; made if missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON for each file.")]


def compress(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT", help="Pictures (JPEG, PNG, WebP), or folders of pictures.")
    ],
    output: Output,
    quality: Annotated[
        float | None,
        typer.Option("--quality", "-q", min=1, max=8, help="From 1, smallest, to 8, finest.", show_default="4"),
    ] = None,
    target_bytes: Annotated[
        int | None,
        typer.Option("--target-bytes", min=1, help="In place of a quality: the finest that fits in this many bytes."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="ID", help="Codec: a bundled name, a bundle's folder or a model id.")
    ] = "detection",
    effort: Annotated[
        int,
        typer.Option(
            "--effort",
            min=0,
            metavar="N",
            help="Gradient steps that better each picture's latents for the codec's task network: slow, a tenth of "
            "a second a step and more. Any decoder reads the result.",
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Code pictures for machines: a.jpg becomes DIR/a.slc."""
    if quality is not None and target_bytes is not None:
        raise typer.BadParameter("--quality and --target-bytes cannot both be given")
    if effort and target_bytes is not None:
        raise typer.BadParameter("--effort and --target-bytes cannot both be given: effort changes the size")
    jobs = plan(expand(inputs, PICTURE_SUFFIXES), output, BITSTREAM_SUFFIX)
    quality = DEFAULT_QUALITY if quality is None else quality

    import numpy as np

    from shared.codec.bitstream import to_bytes
    from shared.codec.codec import Codec
    from shared.codec.types import Frame

    codec = Codec.load(find_named(model))
    codec.encode(Frame(np.zeros((64, 64, 3), np.uint8)))  # starts the kernels: that is no file's encode_ms
    labour = None
    if effort:
        from trainer.effort import labourer

        labour = labourer(codec, effort)
    make_folder(output)
    read_bytes = written_bytes = 0

    def encode(frame: Frame) -> "Bitstream":
        if target_bytes is not None:
            return codec.encode_to_size(frame, target_bytes)
        return codec.encode(frame, quality) if labour is None else labour(frame, quality)

    def work(job: Job) -> None:
        nonlocal read_bytes, written_bytes
        picture = job.source.read_bytes()
        frame = read_frame(picture)
        start = time.perf_counter()
        bitstream = encode(frame)
        data = to_bytes(bitstream)
        encode_ms = 1000 * (time.perf_counter() - start)
        write_atomically(job.target, data)
        read_bytes += len(picture)
        written_bytes += len(data)
        told = account(job, bitstream, len(data), encode_ms)
        print(json.dumps(told) if as_json else COMPRESSED.format(**told), flush=True)

    try:
        for_each(jobs, work, "compress")
    finally:
        if not as_json and len(jobs) > 1 and written_bytes:
            print(f"{read_bytes:,} bytes became {written_bytes:,}: {read_bytes / written_bytes:.1f} times fewer")


COMPRESSED = (
    "{input} -> {output}  {width}x{height}  {bytes:,} bytes  {bpp:.4f} bpp  quality {quality:g}  {encode_ms:.1f} ms"
)


def account(job: Job, bitstream: "Bitstream", size_bytes: int, encode_ms: float) -> dict[str, Any]:
    """One line of `compress --json`."""
    from shared.codec.types import QUALITY_STEP

    return {
        "input": str(job.source),
        "output": str(job.target),
        "width": bitstream.width,
        "height": bitstream.height,
        "bytes": size_bytes,
        "bpp": round(8 * size_bytes / (bitstream.width * bitstream.height), 5),
        "quality": bitstream.quality / QUALITY_STEP,
        "encode_ms": round(encode_ms, 2),
    }


def decompress(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="FILE.slc", help="Coded files, or folders of files ending in .slc.")
    ],
    output: Output,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR", help="A bundle's folder, beside the bundled ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode to pictures of the original size: a.slc becomes DIR/a.png."""
    jobs = plan(expand(inputs, {BITSTREAM_SUFFIX}), output, ".png")
    refuse_foreign([job.target for job in jobs])
    decoders = Decoders(model)
    make_folder(output)

    def work(job: Job) -> None:
        codec, bitstream = decoders.read(job.source.read_bytes())
        start = time.perf_counter()
        frame = codec.decode(bitstream)
        decode_ms = 1000 * (time.perf_counter() - start)
        write_atomically(job.target, encode_png(frame.rgb))
        if as_json:
            told = {"input": str(job.source), "output": str(job.target), "width": frame.width, "height": frame.height}
            print(json.dumps({**told, "decode_ms": round(decode_ms, 2)}), flush=True)
        else:
            print(f"{job.source} -> {job.target}  {frame.width}x{frame.height}  {decode_ms:.1f} ms")

    for_each(jobs, work, "decompress")


def refuse_foreign(targets: list[Path]) -> None:
    """A decoded picture may replace an earlier decoded one, never the original that lies beside its coded file.
    Raises typer.BadParameter."""
    from PIL import Image

    for target in targets:
        if target.exists():
            try:
                with Image.open(target) as picture:
                    ours = picture.info.get("Software") == MADE_BY
            except OSError:
                ours = False
            if not ours:
                raise typer.BadParameter(f"'{target}' is there already and was not made by this command")

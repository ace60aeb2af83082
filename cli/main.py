"""The front door: one Typer app, `sightline`, which imports the room it needs only when asked for it.

Nothing heavy is imported at the top of any module of this room, so that `sightline --help` is instant and
`sightline compress` pulls in the codec but no task model.

Exit codes: 0 done; 1 work that failed, said in one sentence on stderr; 2 wrong usage, said before any work.
"""

import sys
from typing import Annotated

import typer

from cli import admin, bench, camera, certs, compress, detect, doctor, info, quarantine, services, training
from cli.demo import command as demo
from cli.flags import PASS_ON
from cli.watch import command as watch
from shared.errors import InvalidQuality, InvalidSettings, SightlineError

# What an installation without an extra lacks -> the extra that brings it.
EXTRA_OF = {
    "torchvision": "cloud",
    "supervision": "cloud",
    "onnxruntime": "onnx",
    "opentelemetry": "tracing",
    "starlette": "console",
    "uvicorn": "console",
    "compressai": "train",
    "lightning": "train",
    "matplotlib": "train",
    "pycocotools": "train",
    "bjontegaard": "train",
    "imageio_ffmpeg": "train",
    "constriction": "bench",
    "av": "camera",
    "pyarrow": "parquet",
}

app = typer.Typer(
    name="sightline",
    help="Carries what machines need to see from a camera to the cloud.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"sightline {version('sightline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("compress", rich_help_panel="Pictures")(compress.compress)
app.command("decompress", rich_help_panel="Pictures")(compress.decompress)
app.command("detect", rich_help_panel="Pictures")(detect.detect)
app.command("info", rich_help_panel="Pictures")(info.info)
app.command("demo", rich_help_panel="Start here")(demo.demo)
app.command("camera", rich_help_panel="Cameras and consumers")(camera.camera)
app.command("watch", rich_help_panel="Cameras and consumers")(watch.watch)
app.command("edge", rich_help_panel="Services", context_settings=PASS_ON)(services.edge)
app.command("cloud", rich_help_panel="Services", context_settings=PASS_ON)(services.cloud)
examine = typer.Typer(no_args_is_help=True)
examine.command("edge", context_settings=PASS_ON)(doctor.edge)
examine.command("cloud", context_settings=PASS_ON)(doctor.cloud)
app.add_typer(examine, name="doctor", rich_help_panel="Operate", help="Find what stands in a service's way.")
app.add_typer(admin.admin, name="admin", rich_help_panel="Operate", help="Look into a running service, and change it.")
app.add_typer(
    quarantine.quarantine, name="quarantine", rich_help_panel="Operate", help="List, save and replay rejected frames."
)
app.add_typer(
    certs.certs, name="certs", rich_help_panel="Operate", help="Make certificates and tokens for development."
)

train = typer.Typer(no_args_is_help=True)
train.command("codec", context_settings=PASS_ON)(training.codec)
train.command("entropy", context_settings=PASS_ON)(training.entropy)
train.command("scales", context_settings=PASS_ON)(training.scales)
train.command("task", context_settings=PASS_ON)(training.task)
app.add_typer(train, name="train", rich_help_panel="Train and measure", help="Train a codec or a task network.")
app.command("evaluate", rich_help_panel="Train and measure", context_settings=PASS_ON)(training.evaluate)
app.command("bench", rich_help_panel="Train and measure", context_settings=PASS_ON)(bench.bench)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. `arguments` defaults to ``sys.argv[1:]``. Always ends in SystemExit."""
    try:
        app(arguments, prog_name="sightline")
    except (InvalidSettings, InvalidQuality) as error:
        fail(str(error), code=2)
    except SightlineError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        fail(f"this needs the package {error.name}, which comes with: pip install 'sightline[{extra}]'")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def fail(sentence: str, code: int = 1) -> None:
    print(f"sightline: {sentence}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()

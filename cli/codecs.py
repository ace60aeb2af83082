"""Which codec a command means: the one named, or the one that a file says it was made with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from shared.errors import InvalidBundle, UnknownModel

if TYPE_CHECKING:
    from shared.codec.codec import Codec
    from shared.codec.types import Bitstream

HEX_DIGITS = frozenset("0123456789abcdef")
SHORTEST_PREFIX = 8  # hex digits of a model id that are taken for one


def find_named(reference: str) -> Path:
    """A codec bundle's folder by bundled name, folder, or model id (whole, or its first 8 or more digits).
    Raises typer.BadParameter, InvalidBundle."""
    from shared.codec.bundle import find_bundle

    if len(reference) >= SHORTEST_PREFIX and HEX_DIGITS.issuperset(reference):
        for model_id, folder in bundled():
            if model_id.startswith(reference):
                return folder
    try:
        return find_bundle(reference)
    except UnknownModel as error:
        raise typer.BadParameter(str(error), param_hint="'--model'") from None


def bundled() -> Iterator[tuple[str, Path]]:
    """Model id and folder of each codec that ships with the product."""
    from shared.codec.bundle import bundled_names, find_bundle

    for name in bundled_names():
        folder = find_bundle(name)
        yield read_manifest(folder)["model_id"], folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """A bundle's manifest, unchecked but for being one. Raises InvalidBundle."""
    from shared.codec.bundle import MANIFEST

    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {"model_id": str(manifest["model_id"]), **manifest}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidBundle(f"{folder / MANIFEST}: expected a bundle's manifest, got {error!r}") from error


class Decoders:
    """Bitstreams to their codecs; a codec is loaded when its first file comes.

    `reference`: a bundle's folder, beside the bundled ones.
    """

    def __init__(self, reference: str | None = None) -> None:
        self._folders = dict(bundled())
        self._loaded: dict[str, Codec] = {}
        if reference is not None:
            folder = find_named(reference)
            self._folders[read_manifest(folder)["model_id"]] = folder

    def read(self, data: bytes) -> tuple["Codec", "Bitstream"]:
        """Codec and parsed bitstream of an .slc file's bytes. Raises InvalidBitstream, UnknownModel, InvalidBundle."""
        from shared.codec.bitstream import from_bytes
        from shared.codec.codec import Codec

        bitstream = from_bytes(data, self._folders.keys())
        codec = self._loaded.get(bitstream.model_id)
        if codec is None:
            codec = self._loaded[bitstream.model_id] = Codec.load(self._folders[bitstream.model_id])
        return codec, bitstream

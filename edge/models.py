"""The codec bundles that an edge encodes with, which may change while it runs.

    add     a bundle serves beside the others, perhaps as the default
    retire  no new picture gets it; it goes when no picture is coded with it any more and the spool holds none of its
            frames, so that what the cloud is told stays true until the last of them is acknowledged

One event loop owns it; only `Codec`s are used from other threads.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.codec.codec import Codec
from shared.errors import UnknownModel


@dataclass(slots=True)
class Loaded:
    """A bundle in use. `pictures`: in work with it now."""

    codec: Codec
    retiring: bool = False
    pictures: int = 0


class Models:
    """See the head of this module. `codecs`: the first is the default."""

    def __init__(self, codecs: list[Codec]) -> None:
        self._loaded = {codec.model_id: Loaded(codec) for codec in codecs}
        self._default = codecs[0].model_id
        self._idle = asyncio.Condition()
        # By model id, what the engine looks into; kept in step with `_loaded`.
        self.encoders: dict[str, Codec] = {codec.model_id: codec for codec in codecs}

    @property
    def default(self) -> str:
        """Model id of what is used where a picture names no bundle."""
        return self._default

    @property
    def ids(self) -> list[str]:
        """Model ids, the default first."""
        return sorted(self._loaded, key=lambda model_id: model_id != self._default)

    def loaded(self) -> list[Loaded]:
        """The default first."""
        return [self._loaded[model_id] for model_id in self.ids]

    def resolve(self, reference: str) -> str:
        """The model id of a name or id, "" for the default. Of two bundles with one name the later is meant.

        Raises UnknownModel.
        """
        if not reference:
            return self._default
        serving = {model_id: each for model_id, each in self._loaded.items() if not each.retiring}
        if reference in serving:
            return reference
        named = [model_id for model_id, each in serving.items() if each.codec.bundle.name == reference]
        if not named:
            known = ", ".join(f"{each.codec.bundle.name} ({model_id})" for model_id, each in serving.items())
            raise UnknownModel(f"expected a model id or name out of {known}, got {reference!r}")
        return self._default if self._default in named else named[-1]

    @contextmanager
    def using(self, model_id: str) -> Iterator[None]:
        """A picture that is coded with a bundle; the bundle stays for that long."""
        loaded = self._loaded[model_id]
        loaded.pictures += 1
        try:
            yield
        finally:
            loaded.pictures -= 1

    def add(self, codec: Codec, *, make_default: bool) -> bool:
        """Takes a bundle into use; False if it was there (and is not retiring any more)."""
        new = codec.model_id not in self._loaded
        if new:
            self._loaded[codec.model_id] = Loaded(codec)
            self.encoders[codec.model_id] = codec
        self._loaded[codec.model_id].retiring = False
        if make_default:
            self._default = codec.model_id
        return new

    def retire(self, model_id: str) -> Loaded:
        """No new picture gets it. Raises UnknownModel where it is not there or nothing would be left."""
        if model_id not in self._loaded:
            raise UnknownModel(f"expected a model id out of {', '.join(self.ids)}, got {model_id!r}")
        others = [each for each, loaded in self._loaded.items() if each != model_id and not loaded.retiring]
        if not others:
            raise UnknownModel(f"expected another bundle beside {model_id} before it retires, there is none")
        self._loaded[model_id].retiring = True
        if self._default == model_id:
            self._default = others[-1]
        return self._loaded[model_id]

    def remove(self, model_id: str) -> None:
        """Frees a bundle that retires and that nothing uses."""
        del self._loaded[model_id], self.encoders[model_id]

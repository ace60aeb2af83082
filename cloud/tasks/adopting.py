"""Giving a part of one of torchvision's networks another class, its weights and settings kept."""

from typing import Self

from torch import nn


class Adopting:
    """Mixed in before the class of torchvision's that is overridden."""

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """The same module, with this class's methods."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(module.__dict__)
        return adopted

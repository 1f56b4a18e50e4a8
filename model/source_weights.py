"""Weights as a file holds them, under our names, before they are fitted to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


class WeightsError(ValueError):
    """Initial weights that cannot be used: one line that says which file and what to do."""


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a file."""

    name: str
    """In the file."""
    tensor: Tensor
    """In our layout."""
    axes: tuple[int, ...] | None = None
    """The file's axes in our order; None where the layouts are the same."""

    def in_file(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape of our layout as the file would have it."""
        if self.axes is None or len(shape) != len(self.axes):
            return tuple(shape)
        sizes = dict(zip(self.axes, shape, strict=True))
        return tuple(sizes[axis] for axis in range(len(shape)))


@dataclass(frozen=True)
class SourceWeights:
    """What a weight file holds, and what is known about it."""

    source: str
    """As the user named it."""
    tensors: Mapping[str, SourceTensor]
    """By our name; those of the pyramid as if each convolution had a norm (`fpn.laterals.0.0.weight`)."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Names in the file that are not ours to load, with the reason."""
    class_names: tuple[str, ...] | None = None
    """Of classes 1..C-1, None where they are unknown."""
    class_names_from: str = ""
    """How they are known, for people."""
    class_names_guessed: bool = False
    """Whether the number of classes is all that speaks for them."""
    norm_epsilon: float | None = None
    """Where the norms were trained with another epsilon than their implementation's default."""
    knobs: Mapping[str, object] = field(default_factory=dict)
    """Keys of `ModelConfig` that change no shape, with the values that the weights were trained with."""
    preset: str | None = None
    """Configuration file of the architecture."""


def one_line(error: Exception) -> str:
    """The text of an error of a library, short enough to stand in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."

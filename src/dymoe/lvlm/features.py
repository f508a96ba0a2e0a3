"""What a frozen vision tower and projector make of an image, computed once per image."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from dymoe.errors import DymoeError
from dymoe.lvlm.images import decode

if TYPE_CHECKING:
    from dymoe.lvlm.model import Lvlm
    from dymoe.tasks import Sample

_PLAIN_OUTPUT = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}


class ImageFeatures:
    """Image tokens (tower and projector) by image, in the model's dtype, kept in main memory.

    Images are told apart by the sha256 of their bytes. At most `max_bytes` are kept; the least recently used go
    first and are computed again when they are asked for. The tower always sees `batch_size` images (a short batch
    is filled up with copies), because the kernels of another batch size round otherwise: an image has the same
    features, to the bit, whatever it was computed with.
    """

    def __init__(self, lvlm: "Lvlm", batch_size: int = 64, max_bytes: int = 4 << 30) -> None:
        if batch_size < 1:
            raise DymoeError(f"batch_size: {batch_size} is not a positive number of images")
        self._lvlm = lvlm
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        #: Whether the model makes one tensor of a batch's images (True) or a list with one tensor each.
        self.as_tensor = True

    def __len__(self) -> int:
        """Number of images kept."""
        return len(self._kept)

    def add(self, images: Iterable[bytes]) -> None:
        """Compute what is not there yet.

        Raises:
            DymoeError: an image is broken; the message says which one of `images`, counted from 0.
        """
        self._add((f"image {index}: ", image) for index, image in enumerate(images))

    def add_samples(self, samples: "Iterable[Sample]") -> None:
        """Compute the images of `samples` (those without one are passed over).

        Raises:
            DymoeError: an image is broken; the message names its sample.
        """
        self._add((f"{sample.label}: ", cast(bytes, sample.image)) for sample in samples if sample.has_image)

    def get(self, image: bytes) -> torch.Tensor:
        """The image's tokens, (image_tokens, hidden), on the CPU; computed now if they are not there.

        Raises:
            DymoeError: the image is broken.
        """
        key = hashlib.sha256(image).digest()
        if key not in self._kept:
            self._compute({key: ("", image)})
        self._kept.move_to_end(key)
        return self._kept[key]

    def _encode(self, pictures: Sequence[Any]) -> Sequence[torch.Tensor]:
        return encode(self._lvlm, pictures)

    def _add(self, named: Iterable[tuple[str, bytes]]) -> None:
        waiting: dict[bytes, tuple[str, bytes]] = {}
        for name, image in named:
            key = hashlib.sha256(image).digest()
            if key not in self._kept:
                waiting[key] = (name, image)
            if len(waiting) == self._batch_size:
                self._compute(waiting)
                waiting = {}
        if waiting:
            self._compute(waiting)

    def _compute(self, waiting: dict[bytes, tuple[str, bytes]]) -> None:
        """Encode at most one batch of images, each with what an error about it starts with."""
        pictures = []
        for name, image in waiting.values():
            try:
                pictures.append(decode(image))
            except DymoeError as error:
                raise DymoeError(f"{name}{error}") from error
        pictures += [pictures[-1]] * (self._batch_size - len(pictures))
        encoded = self._encode(pictures)
        self.as_tensor = isinstance(encoded, torch.Tensor)
        for key, value in zip(waiting, encoded[: len(waiting)], strict=True):
            value = value.cpu().clone()
            self._kept[key] = value
            self._bytes += value.nbytes
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes


def takes_features(model: Any) -> bool:
    """Whether the model's forward takes image features that were computed before."""
    import inspect

    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def encode(lvlm: "Lvlm", pictures: Sequence[Any]) -> Sequence[torch.Tensor]:
    """Tower and projector on RGB pictures: one (image_tokens, hidden) tensor each, or all in one tensor.

    The model works in evaluation mode meanwhile, so that a tower's batch norms neither use nor change statistics.

    Raises:
        DymoeError: the model's class takes no precomputed image features, or its features are not one block of tokens
            a picture and nothing else.
    """
    model = cast(Any, lvlm.model)
    if not takes_features(model):
        raise DymoeError(f"{type(model).__name__}: takes no precomputed image features; use it without")
    inputs = cast(Any, lvlm.processor).image_processor(images=list(pictures), return_tensors="pt")
    inputs = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model.get_image_features(**inputs, return_dict=True)
    finally:
        model.train(training)
    tokens: Sequence[torch.Tensor] = output.pooler_output
    beside = {key for key, value in output.items() if value is not None} - _PLAIN_OUTPUT
    if beside or len(tokens) != len(pictures) or tokens[0].dim() != 2:
        raise DymoeError(f"{type(model).__name__}: its image features are more than a block of tokens a picture")
    return tokens

"""What a frozen vision tower and projector make of an image, computed once per image."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch

from dymoe.adapter.observation import evaluating
from dymoe.errors import DymoeError
from dymoe.images import cores, decode, opened

if TYPE_CHECKING:
    from dymoe.models.model import Lvlm
    from dymoe.tasks import Sample

LARGE = 1 << 24  # pixels of a picture that is prepared alone: it may take a GiB until it is scaled
_LARGE_ONES = Lock()
_PLAIN_OUTPUT = {"last_hidden_state", "pooler_output", "hidden_states", "attentions"}


class ImageFeatures:
    """Image tokens (tower and projector) by image, in the model's dtype, kept in main memory.

    Images are told apart by the sha256 of their bytes. At most `max_bytes` are kept; the least recently used go
    first and are computed again when they are asked for. Pictures are decoded and scaled by all CPU cores while the
    tower works on those before. The tower always sees `batch_size` images (a short batch is filled up with copies),
    because the kernels of another batch size round otherwise: an image has the same features, to the bit, whatever it
    was computed with. So ask for many images at once, not for one after the other.

    Attributes:
        as_tensor: whether the model makes one tensor of a batch's images (True) or a list with one tensor each.
        image_bytes: of the largest image's features so far.
    """

    def __init__(self, lvlm: "Lvlm", batch_size: int = 16, max_bytes: int = 4 << 30) -> None:
        if batch_size < 1:
            raise DymoeError(f"batch_size: {batch_size} is not a positive number of images")
        self._lvlm = lvlm
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self.as_tensor = True
        self.image_bytes = 0

    def __len__(self) -> int:
        """Number of images kept."""
        return len(self._features)

    def holds(self, images: int) -> bool:
        """Whether the features of so many images can be kept, as far as those seen so far tell."""
        return images * self.image_bytes <= self._max_bytes

    def add(self, images: Iterable[bytes]) -> None:
        """Compute what is not there yet.

        Raises:
            DymoeError: an image is broken; the message says which one of `images`, counted from 0.
        """
        for _ in self._computed((f"image {index}: ", image) for index, image in enumerate(images)):
            pass

    def add_samples(self, samples: "Iterable[Sample]") -> None:
        """Compute the images of `samples` (those without one are passed over).

        Raises:
            DymoeError: an image is broken; the message names its sample.
        """
        for _ in self._computed(_named_images(samples)):
            pass

    def get(self, image: bytes) -> torch.Tensor:
        """The image's tokens, (image_tokens, hidden), on the CPU; computed now if they are not there.

        Raises:
            DymoeError: the image is broken.
        """
        return self._lookup([("", image)])[0]

    def of_samples(self, samples: "Sequence[Sample]") -> list[torch.Tensor]:
        """The tokens of each sample's image, as `get`; what is not there is computed together.

        Raises:
            DymoeError: an image is broken; the message names its sample.
        """
        return self._lookup(list(_named_images(samples)))

    def _encode(self, inputs: dict[str, Any]) -> Sequence[torch.Tensor]:
        return encode(self._lvlm, inputs)

    def _lookup(self, named: Sequence[tuple[str, bytes]]) -> list[torch.Tensor]:
        keys = [hashlib.sha256(image).digest() for _, image in named]
        features = {key: self._features[key] for key in keys if key in self._features}
        for key in features:
            self._features.move_to_end(key)
        features.update(self._computed(pair for key, pair in zip(keys, named, strict=True) if key not in features))
        return [features[key] for key in keys]

    def _computed(self, named: Iterable[tuple[str, bytes]]) -> Iterator[tuple[bytes, torch.Tensor]]:
        """Key and features of what is not kept yet, computed in batches, kept as they come."""
        with ThreadPoolExecutor(cores()) as pool:
            ahead: list[tuple[bytes, Future[dict[str, Any]]]] = []
            for batch in self._batches(named):
                now, ahead = ahead, [(key, pool.submit(_prepared, self._lvlm, *pair)) for key, pair in batch.items()]
                yield from self._finish(now)
            yield from self._finish(ahead)

    def _batches(self, named: Iterable[tuple[str, bytes]]) -> Iterator[dict[bytes, tuple[str, bytes]]]:
        """What is not kept yet in batches for the tower, each image once."""
        waiting: dict[bytes, tuple[str, bytes]] = {}
        before: dict[bytes, tuple[str, bytes]] = {}  # the batch that is not finished when the next one is collected
        for name, image in named:
            key = hashlib.sha256(image).digest()
            if key not in self._features and key not in before:
                waiting[key] = (name, image)
            if len(waiting) == self._batch_size:
                yield waiting
                before, waiting = waiting, {}
        if waiting:
            yield waiting

    def _finish(self, batch: "list[tuple[bytes, Future[dict[str, Any]]]]") -> Iterator[tuple[bytes, torch.Tensor]]:
        """Encode at most one batch of prepared images."""
        if not batch:
            return
        inputs = [future.result() for _, future in batch]
        inputs += [inputs[-1]] * (self._batch_size - len(inputs))
        encoded = self._encode(joined(inputs))
        self.as_tensor = isinstance(encoded, torch.Tensor)
        for (key, _), value in zip(batch, encoded[: len(batch)], strict=True):
            value = value.cpu().clone()
            self._keep(key, value)
            yield key, value

    def _keep(self, key: bytes, value: torch.Tensor) -> None:
        self._features[key] = value
        self._bytes += value.nbytes
        self.image_bytes = max(self.image_bytes, value.nbytes)
        while self._bytes > self._max_bytes and len(self._features) > 1:
            _, old = self._features.popitem(last=False)
            self._bytes -= old.nbytes


def _named_images(samples: "Iterable[Sample]") -> Iterator[tuple[str, bytes]]:
    return ((f"{sample.label}: ", cast(bytes, sample.image)) for sample in samples if sample.has_image)


def _prepared(lvlm: "Lvlm", name: str, image: bytes) -> dict[str, Any]:
    """The model's inputs for one picture; an error begins with `name`."""
    try:
        with opened(image) as header:
            large = header.width * header.height > LARGE
        with _LARGE_ONES if large else nullcontext():
            picture = decode(image)
            return dict(cast(Any, lvlm.processor).image_processor(images=[picture], return_tensors="pt"))
    except DymoeError as error:
        raise DymoeError(f"{name}{error}") from error


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an image processor made of single pictures as it would have made it of all of them.

    Tensors are put one behind the other, smaller ones filled up with zeros at the end of each further dimension.
    """

    def one(values: list[Any]) -> Any:
        if not isinstance(values[0], torch.Tensor):
            return [item for value in values for item in value]
        shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        if all(list(value.shape[1:]) == shape for value in values):
            return torch.cat(values)
        padded = values[0].new_zeros(sum(len(value) for value in values), *shape)
        start = 0
        for value in values:
            padded[(slice(start, start + len(value)), *map(slice, value.shape[1:]))] = value
            start += len(value)
        return padded

    return {name: one([each[name] for each in parts]) for name in parts[0]}


def same(first: Any, second: Any) -> bool:
    """Whether two nested values are equal, their tensors to the bit and in dtype."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def takes_features(model: Any) -> bool:
    """Whether the model's forward takes image features that were computed before."""
    import inspect

    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def encode(lvlm: "Lvlm", inputs: "dict[str, Any]") -> Sequence[torch.Tensor]:
    """Tower and projector on prepared pictures: one (image_tokens, hidden) tensor each, or all in one tensor.

    The model works in evaluation mode meanwhile, so that a tower's batch norms neither use nor change statistics.

    Args:
        lvlm: the model.
        inputs: what its image processor made of the pictures; `pixel_values` has one row each.

    Raises:
        DymoeError: the model's class takes no precomputed image features, or its features are not one block of tokens
            a picture and nothing else.
    """
    model = cast(Any, lvlm.model)
    if not takes_features(model):
        raise DymoeError(f"{type(model).__name__}: takes no precomputed image features; use it without")
    pictures = len(inputs["pixel_values"])
    inputs = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with evaluating(model), torch.no_grad():
        output = model.get_image_features(**inputs, return_dict=True)
    tokens: Sequence[torch.Tensor] = output.pooler_output
    beside = {key for key, value in output.items() if value is not None} - _PLAIN_OUTPUT
    if beside or len(tokens) != pictures or tokens[0].dim() != 2:
        raise DymoeError(f"{type(model).__name__}: its image features are more than a block of tokens a picture")
    return tokens


def cached_features(lvlm: "Lvlm") -> ImageFeatures | None:
    """A cache for the frozen tower's image tokens, None where the model does not allow one.

    Tried out with two made pictures: a cache is right if the processor makes nothing but pixels, if its prompt is
    the template's with the image token repeated, and if the tower's output is one block of tokens a picture. Its
    `holds` then says how many pictures fit.

    Args:
        lvlm: the model and its processor.
    """
    if not takes_features(lvlm.model):
        return None
    from dymoe.models.collate import Collator
    from dymoe.tasks import Sample

    tried = ImageFeatures(lvlm, batch_size=2)
    pair = [Sample(str(size), made_picture(*size), "What is it?", "It", {}) for size in ((40, 24), (20, 48))]
    try:
        plain, cached = Collator(lvlm).prompts(pair), Collator(lvlm, tried).prompts(pair)
    except (DymoeError, TypeError, ValueError, RuntimeError, IndexError):
        return None  # an optimisation alone: without it the model gets the pixels
    same = plain["input_ids"].shape == cached["input_ids"].shape and torch.equal(
        plain["input_ids"], cached["input_ids"]
    )
    if set(plain) != {"input_ids", "attention_mask", "pixel_values"} or not same:
        return None
    features = ImageFeatures(lvlm)
    features.image_bytes = tried.image_bytes
    return features


def made_picture(width: int, height: int) -> bytes:
    """A small picture to try a processor with, as PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()

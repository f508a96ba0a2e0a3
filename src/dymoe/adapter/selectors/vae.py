"""`vae`: one variational autoencoder per group says which group's task a prompt belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dymoe.adapter.selection import Prompt, Selector


@dataclass(frozen=True)
class Vae:
    """One autoencoder: q(z|x) = N(mean, diag exp(log variance)), p(x|z) = N(decoded, 1), p(z) = N(0, 1).

    Encoder and decoder have one hidden layer each with ReLU. All tensors have one dtype.

    Args:
        encoder_in: (hidden, features), with its bias (hidden,).
        encoder_out: (2 latent, hidden), with its bias; the first half gives the mean, the second the log variance.
        decoder_in: (hidden, latent), with its bias (hidden,).
        decoder_out: (features, hidden), with its bias (features,).
    """

    encoder_in: Tensor
    encoder_in_bias: Tensor
    encoder_out: Tensor
    encoder_out_bias: Tensor
    decoder_in: Tensor
    decoder_in_bias: Tensor
    decoder_out: Tensor
    decoder_out_bias: Tensor

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), (..., latent) each, of inputs (..., features)."""
        inner = F.relu(F.linear(x, self.encoder_in, self.encoder_in_bias))
        mean, log_variance = F.linear(inner, self.encoder_out, self.encoder_out_bias).chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z), (..., features), of codes (..., latent)."""
        inner = F.relu(F.linear(z, self.decoder_in, self.decoder_in_bias))
        return F.linear(inner, self.decoder_out, self.decoder_out_bias)

    def bound(self, x: Tensor, noise: Tensor, kl_weight: float = 1.0) -> Tensor:
        """The evidence lower bound with one draw of z per input: log p(x|z) - kl_weight KL(q(z|x) || p(z)), (...).

        Args:
            x: (..., features).
            noise: (..., latent), standard normal.
            kl_weight: 1 for the bound itself.
        """
        mean, log_variance = self.encode(x)
        z = mean + (0.5 * log_variance).exp() * noise
        return log_likelihood(x, self.decode(z)) - kl_weight * kl_divergence(mean, log_variance)

    def score(self, x: Tensor) -> Tensor:
        """Reconstruction score log p(x|z) at z = the mean of q(z|x), (...), of inputs (..., features).

        The reconstruction probability is an expectation over q(z|x); its value at the mean needs no random numbers,
        so that the same prompt always gets the same router.
        """
        return log_likelihood(x, self.decode(self.encode(x)[0]))


TENSORS = tuple(Vae.__dataclass_fields__)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log variance)) || N(0, 1)) in nats, summed over the last dimension: (...)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def log_likelihood(x: Tensor, decoded: Tensor) -> Tensor:
    """Log N(x; decoded, 1) in nats, summed over the features (the last dimension): (...)."""
    return -0.5 * ((x - decoded).square() + math.log(2 * math.pi)).sum(-1)


def fit_vae(
    x: Tensor,
    hidden: int,
    latent: int,
    kl_weight: float = 1.0,
    epochs: int = 100,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> Vae:
    """Train an autoencoder with Adam on the negative bound, a mean over the batch.

    All random numbers (weights, order, noise) come from a generator of its own, on the CPU.

    Args:
        x: standardised features, (samples, features), float32.
        hidden: width of both hidden layers.
        latent: size of the code.
        kl_weight: weight of the divergence in the objective.
        epochs: passes over the samples.
        lr: Adam's learning rate.
        batch_size: samples per step.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    start = _start(x.shape[1], hidden, latent, generator)
    vae = Vae(**{name: value.to(x.device).requires_grad_() for name, value in start.items()})
    optimizer = torch.optim.Adam([getattr(vae, name) for name in TENSORS], lr=lr)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator)
            for chosen in order.split(batch_size):
                noise = torch.randn(len(chosen), latent, generator=generator).to(x.device)
                loss = -vae.bound(x[chosen.to(x.device)], noise, kl_weight).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return Vae(**{name: getattr(vae, name).detach() for name in TENSORS})


def _start(features: int, hidden: int, latent: int, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Weights uniform in +-1 / sqrt(inputs), as torch starts a Linear; biases 0."""
    shapes = {
        "encoder_in": (hidden, features),
        "encoder_out": (2 * latent, hidden),
        "decoder_in": (hidden, latent),
        "decoder_out": (features, hidden),
    }
    weights = {}
    for name, (outputs, inputs) in shapes.items():
        uniform = torch.rand(outputs, inputs, generator=generator) * 2 - 1
        weights[name], weights[f"{name}_bias"] = uniform / math.sqrt(inputs), torch.zeros(outputs)
    return weights


class VaeSelector(Selector):
    """LLaVA-CMoE's probabilistic task locator (arXiv 2503.21227, section 3.2.3): a hard choice of one group.

    The feature of a prompt is the last token's last hidden state in the frozen model, adapters off. Group g
    standardises it with the means and deviations of its own training features, reconstructs it with its own
    autoencoder and standardises the reconstruction score with the mean and deviation of its own training scores. The
    group with the largest standardised score gets weight 1.

    A group is fitted after its task (`fit`) and never trains with the model: its parameters have no gradient. As long
    as a group trains nothing is selected, so that its own router decides. `selector_options`: hidden, latent.
    """

    name: ClassVar[str] = "vae"
    adapter_layer_names = (*(f"dymoe_{name}" for name in TENSORS), "dymoe_center", "dymoe_spread", "dymoe_scores")

    def __init__(self, width: int) -> None:
        super().__init__(width)
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())

    def add_group(self, group: str, options: Mapping[str, Any]) -> None:
        """Make room for the group's autoencoder and statistics, float32; their deviation 0 says: not fitted yet.

        Raises:
            ValueError: `hidden` or `latent` is no whole number of at least 1, or there is an unknown option.
        """
        sizes = {"hidden": 128, "latent": 32, **options}
        for key, value in sizes.items():
            if key not in ("hidden", "latent"):
                raise ValueError(f"selector_options: {key!r}: the vae selector has hidden and latent")
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"selector_options: {key} must be a whole number of at least 1, got {value!r}")
        tensors = {
            **_start(self.width, sizes["hidden"], sizes["latent"], None),
            "center": torch.zeros(self.width),
            "spread": torch.ones(self.width),
            "scores": torch.zeros(2),
        }
        for name, tensor in tensors.items():
            getattr(self, f"dymoe_{name}")[group] = nn.Parameter(tensor, requires_grad=False)

    def _apply_requires_grad(self, allowed: bool) -> None:
        """No group ever trains by gradient from the model's loss."""

    def vae(self, group: str) -> Vae:
        """The group's autoencoder."""
        return Vae(**{name: getattr(self, f"dymoe_{name}")[group] for name in TENSORS})

    def fit(
        self,
        group: str,
        features: Tensor,
        kl_weight: float = 1.0,
        epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        """Fit the group's autoencoder and its statistics to the features of its task's training prompts.

        Args:
            group: its name.
            features: (samples, width), float32; the rest as for `fit_vae`.
        """
        with torch.no_grad():
            center, spread = features.mean(0), features.std(0, correction=0)
            # A feature that hardly varies in training would rule the score by its rounding alone.
            spread = spread.clamp(min=max(float(spread.median()) * 1e-2, 1e-6))
            x = (features - center) / spread
        hidden, latent = self.dymoe_decoder_in[group].shape  # type: ignore[index,union-attr]
        fitted = fit_vae(x, hidden, latent, kl_weight, epochs, lr, batch_size, seed)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            scores = fitted.score(x)
            deviation = scores.std(correction=0).clamp(min=1e-6)
            tensors = {name: getattr(fitted, name) for name in TENSORS}
            tensors |= {"center": center, "spread": spread, "scores": torch.stack([scores.mean(), deviation])}
            for name, value in tensors.items():
                getattr(self, f"dymoe_{name}")[group].copy_(value)

    def standard_scores(self, features: Tensor, groups: Sequence[str]) -> Tensor:
        """Each group's standardised reconstruction score, (samples, groups), of features (samples, width).

        Raises:
            ValueError: a group's autoencoder was never fitted.
        """
        columns = []
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            for group in groups:
                mean, deviation = self.dymoe_scores[group]  # type: ignore[index,union-attr]
                if not deviation > 0:
                    raise ValueError(f"group {group!r}: its task locator was not fitted after its task")
                center, spread = self.dymoe_center[group], self.dymoe_spread[group]  # type: ignore[index,union-attr]
                x = (features.float() - center) / spread
                columns.append((self.vae(group).score(x) - mean) / deviation)
        return torch.stack(columns, dim=1)

    def locate(self, features: Tensor, groups: Sequence[str]) -> Tensor:
        """The number of the group each sample belongs to, (samples,), int64."""
        return self.standard_scores(features, groups).argmax(1)

    def select(self, prompt: Prompt, groups: Sequence[str]) -> Tensor | None:
        """1 for the group located, 0 for the others; None while a group trains and where there is no choice."""
        if self.training_group is not None or len(groups) < 2:
            return None
        return F.one_hot(self.locate(prompt.features(), groups), len(groups)).float()

"""The judge's convolutional network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """A small convolutional network that names pictures, trained apart from the denoiser.

    Args:
        names: Number of concepts.
        channels: Channels at 16x16, 8x8 and 4x4.
        squeeze: Channels that the 4x4 features are cut to before they are flattened.
        features: Dimensions of the embedding.
    """

    def __init__(
        self,
        names: int,
        channels: tuple[int, int, int] = (32, 64, 96),
        squeeze: int = 48,
        features: int = 128,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in channels:
            layers += [*_convolve(previous, width, stride=2), *_convolve(width, width, stride=1)]
            previous = width
        self.body = nn.Sequential(*layers, nn.Conv2d(previous, squeeze, 1), nn.Flatten())
        self.embed = nn.Linear(squeeze * 4 * 4, features, bias=False)
        self.norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(0.3)
        self.name = nn.Linear(features, names)

    def features(self, images: Tensor) -> Tensor:
        """Embed (b, 3, 32, 32) images as (b, 128)."""
        embedded: Tensor = self.norm(self.embed(self.body(images)))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """(b, names) logits of (b, 3, 32, 32) images."""
        logits: Tensor = self.name(self.dropout(F.relu(self.features(images))))
        return logits


def _convolve(entering: int, leaving: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(leaving), nn.ReLU()]

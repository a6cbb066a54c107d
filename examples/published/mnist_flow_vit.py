"""The class-conditional flow-matching model of MNIST by S. Dominguez, as a network for `--import`.

Weights: github: sofia-dominguezc/MNIST-diffusion, commit 88bc058, parameters/MNIST/DiffusionViT.pth (MIT).
A recipe names it by `--import examples/published/mnist_flow_vit.py` and `teacher: {kind: module, ...}` with
`module: mnist-flow-vit` (docs/guide/own_teacher.md); examples/own_teacher.py brings the same model from Python.
"""

import math

import torch
from torch import Tensor, nn

import flowmap

WIDTH, PATCH, SIDE = 64, 7, 4
WEIGHTS = "mnist-flow-vit/DiffusionViT.pth"
SHA256 = "2fd387f3a0c7bbd74cb209e4a7db43f18418a974e63b3d4b493fa2ab2f34f90c"


@flowmap.module("mnist-flow-vit")
class FlowViT(nn.Module):
    """Predicted pixels in [0, 1] from x (B, 1, 28, 28) at time t (B,), 0 noise and 1 data, and labels (B,) in 0..10.

    Label 10 is no class. Sixteen patches, two tokens of the time and two of the class go through four post-norm
    transformer layers.
    """

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE**2, WIDTH))
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, activation="gelu", batch_first=True) for _ in range(4)
        )
        self.unpatch = nn.ConvTranspose2d(WIDTH, 1, PATCH, stride=PATCH)
        self.y_encoder = nn.Embedding(11, 2 * WIDTH)

    def time(self, t: Tensor) -> Tensor:
        """(B, 2, 64): a token of sines and one of cosines."""
        places = torch.arange(WIDTH, device=t.device, dtype=t.dtype)
        angles = t[:, None] * torch.exp(places * (-math.log(1e4) / (WIDTH - 1)))
        return torch.stack([angles.sin(), angles.cos()], dim=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).mT + self.pos_embed
        tokens = torch.cat([patches, self.time(t), self.y_encoder(label).unflatten(1, (2, WIDTH))], dim=1)
        for layer in self.transformer:
            tokens = layer(tokens)
        return self.pixels(tokens[:, : SIDE**2])

    def pixels(self, tokens: Tensor) -> Tensor:
        """The transposed convolution `unpatch`, whose patches do not overlap, as a product: faster on a CPU."""
        patches = (tokens @ self.unpatch.weight.flatten(1)).unflatten(2, (PATCH, PATCH)).unflatten(1, (SIDE, SIDE))
        return patches.transpose(2, 3).flatten(3).flatten(1, 2)[:, None] + self.unpatch.bias

"""A model that others published becomes a student of 1, 2 and 4 steps: its network, its weights, and pictures.

    python examples/own_teacher.py [FOLDER [key=value ...]]

FOLDER has mnist-flow-vit/ and mnist-test/ (by default ../shared/published). The model: a class-conditional flow of
MNIST, github: sofia-dominguezc/MNIST-diffusion (MIT). Its t = 0 is noise and 1 data, its pixels are in [0, 1].
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

import flowmap
from flowmap.data.images.idx import read

root = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/published")
if not (root / "mnist-flow-vit/DiffusionViT.pth").is_file():
    sys.exit(f"{root}: has no mnist-flow-vit/DiffusionViT.pth; see the top of this file")


class FlowViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.unpatch = nn.Conv2d(1, 64, 7, 7), nn.ConvTranspose2d(64, 1, 7, 7)
        self.pos_embed, self.y_encoder = nn.Parameter(torch.zeros(1, 16, 64)), nn.Embedding(11, 128)
        block = lambda: nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True)
        self.transformer = nn.Sequential(block(), block(), block(), block())

    def time_tokens(self, t):
        angle = t[:, None] * torch.exp(-torch.arange(64, device=t.device) * math.log(1e4) / 63)
        return torch.stack([angle.sin(), angle.cos()], 1)

    def forward(self, x, t, label):
        patches = self.patch_embed(x).flatten(2).mT + self.pos_embed
        x = torch.cat([patches, self.time_tokens(t), self.y_encoder(label).unflatten(1, (2, 64))], 1)
        return self.unpatch(self.transformer(x)[:, :16].mT.unflatten(2, (4, 4)))


net = FlowViT()
net.load_state_dict(torch.load(root / "mnist-flow-vit/DiffusionViT.pth", weights_only=True))
teacher = flowmap.wrap(
    net, prediction="x0", clock="reversed", range=(0, 1), classes=10, null_class=10, time_embedding="time_tokens"
)
pictures, labels = (read(root / "mnist-test", f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
data = flowmap.as_data((pictures[:, None], labels.long()), range=(0, 255))
recipe = flowmap.read_recipe("digits", ["name=own-teacher", "teacher.guidance=null", *sys.argv[2:]])
run = flowmap.fit(recipe, teacher=teacher, data=data)
print(run.student.sample(10, steps=2).shape, run.metrics["student"])

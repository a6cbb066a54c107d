"""Two models that others published become students of 1, 2 and 4 steps: networks, weights and pictures are given.

    python examples/own_teacher.py [FOLDER [key=value ...]]

FOLDER has mnist-flow-vit/, mnist-ddpm/ and mnist-test/ (by default ../shared/published). A class-conditional flow of
MNIST (github: sofia-dominguezc/MNIST-diffusion, MIT) predicts the picture, in [0, 1]; its t = 0 is noise and 1 data. A
DDPM (github: Charles-yueyue831/DDPM, Apache-2.0) predicts the noise at one of 1,000 places, without classes. That says
little of the data at the noise end, and its dF/dt is large: it takes the settings of published/mnist_ddpm.yaml.
"""

import sys
from pathlib import Path

import torch
from published.mnist_ddpm import DDPM  # the networks, as files of your own
from published.mnist_flow_vit import FlowViT

import flowmap
from flowmap.data.images.idx import read

root = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/published")
if not (root / "mnist-flow-vit/DiffusionViT.pth").is_file():
    sys.exit(f"{root}: has no mnist-flow-vit/DiffusionViT.pth; see the top of this file")


def with_weights(net, file):
    net.load_state_dict(torch.load(root / file, map_location="cpu", weights_only=True))
    return net


teachers = {
    "mnist-flow-vit": flowmap.wrap(
        with_weights(FlowViT(), "mnist-flow-vit/DiffusionViT.pth"),
        prediction="x0",
        clock="reversed",
        range=(0, 1),
        classes=10,
        null_class=10,
        time_embedding="time",
        name="mnist-flow-vit",  # by which the file registers it
    ),
    "mnist-ddpm": flowmap.wrap(
        with_weights(DDPM(), "mnist-ddpm/ddpm_mnist.pth"),
        prediction="epsilon",
        clock="ddpm",
        time_embedding="pe_linear",
        name="mnist-ddpm",
    ),
}
pictures, labels = (read(root / "mnist-test", f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
data = flowmap.as_data((pictures[:, None], labels.long()), range=(0, 255))
careful = ["times.one_step=0.0", "sampler.t_max=0.95", "optimizer.lr=1.0e-4"]
for name, base, settings in (("mnist-flow-vit", "digits", []), ("mnist-ddpm", "digits-ayf-lmd", careful)):
    recipe = flowmap.read_recipe(base, [f"name=own-{name}", "teacher.guidance=null", *settings, *sys.argv[2:]])
    run = flowmap.fit(recipe, teacher=teachers[name], data=data)
    print(name, run.student.sample(10, steps=2).shape, run.metrics["student"])

"""Today's base models: our velocity is that of diffusers' own pipelines, and their students with adapters train.

The pipelines run their own loop with guidance, on real classes with small random weights (tests/support).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.diffusers_calls import CALLS, pack, prepare
from flowmap.nets.diffusers_model import DiffusersNet, clock_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import LoRA, add_lora, merged
from flowmap.teachers.guidance import ClassifierFree
from flowmap.teachers.network import NetworkTeacher
from tests.support import parity, tiny_nets, tiny_pipelines
from tests.support.tiny_nets import TEXT, diffusers, with_random_weights

B, W, STEPS = 2, 2.5, 4
SHAPE = (4, 8, 8)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


WORDS, NOTHING, LATENTS = numbers(B, 5, TEXT), numbers(1, 5, TEXT) + 1, numbers(B, *SHAPE)
SOME = torch.arange(5) < torch.tensor([[5], [3]])  # the second caption is shorter


@dataclass(frozen=True)
class Case:
    """A network and its pipeline, called with conditions as its own; targets of adapters.

    masked: whether it reads which tokens are real. returns: samples as the pipeline returns them.
    """

    model: Callable[[], torch.nn.Module]
    pipeline: Callable
    call: Callable[[], dict]
    masked: bool = True
    rescale_patch: int | None = None  # of its pipeline's guidance
    side: int = 64  # of the picture that the pipeline is asked for
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    returns: Callable[[Tensor, object], Tensor] = lambda x, pipe: x

    def net(self):
        torch.manual_seed(0)
        return with_random_weights(self.model(), 0.15).eval()

    def conditions(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {"text": WORDS.to(dtype)} | ({"text_mask": SOME} if self.masked else {})


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def rows(text: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[seen] for row, seen in zip(text, mask, strict=True)]


def klein(x: Tensor, pipe) -> Tensor:
    """The latents of FLUX.2's autoencoder, which is after the loop."""
    bn = pipe.vae.bn
    std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return torch.nn.functional.pixel_shuffle(x * std.view(-1, 1, 1) + bn.running_mean.view(-1, 1, 1), 2)


EVERY_TOKEN = SOME | True
CASES = {
    "z_image": Case(
        tiny_nets.z_image,
        lambda net: diffusers.ZImagePipeline(flow(), None, None, None, net),
        lambda: {
            "prompt_embeds": rows(WORDS, SOME), "guidance_scale": W - 1, "latents": LATENTS,
            "negative_prompt_embeds": rows(NOTHING.expand(B, -1, -1), EVERY_TOKEN),
        },
    ),
    "hunyuan_image": Case(
        lambda: tiny_nets.hunyuan_image(),
        lambda net: diffusers.HunyuanImagePipeline(
            flow(), None, None, None, None, None, net, guider=diffusers.ClassifierFreeGuidance(W)
        ),
        lambda: {
            "prompt_embeds": WORDS, "prompt_embeds_mask": SOME, "latents": LATENTS,
            "negative_prompt_embeds": NOTHING.expand(B, -1, -1), "negative_prompt_embeds_mask": EVERY_TOKEN,
            **dict.fromkeys(("prompt_embeds_2", "negative_prompt_embeds_2"), torch.zeros(B, 3, 16)),
            **dict.fromkeys(("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), torch.zeros(B, 3)),
        },
        side=8 * 32,
    ),
    "lumina2": Case(
        tiny_nets.lumina2,
        lambda net: diffusers.Lumina2Pipeline(net, flow(), None, None, None),
        lambda: {
            "prompt_embeds": WORDS, "prompt_attention_mask": SOME, "latents": LATENTS, "guidance_scale": W,
            "negative_prompt_embeds": NOTHING.expand(B, -1, -1), "negative_prompt_attention_mask": EVERY_TOKEN,
            "cfg_normalization": False,
        },
    ),
    "aura_flow": Case(
        tiny_nets.aura_flow,
        lambda net: diffusers.AuraFlowPipeline(None, None, None, net, flow()),
        lambda: {
            "prompt_embeds": WORDS, "negative_prompt_embeds": NOTHING.expand(B, -1, -1), "guidance_scale": W,
            "prompt_attention_mask": EVERY_TOKEN, "negative_prompt_attention_mask": EVERY_TOKEN, "latents": LATENTS,
        },
        masked=False,
    ),
    "qwen_image": Case(
        tiny_nets.qwen,
        lambda net: diffusers.QwenImagePipeline(flow(), None, None, None, net),
        lambda: {
            "prompt_embeds": WORDS, "prompt_embeds_mask": SOME, "latents": LATENTS, "true_cfg_scale": W,
            "negative_prompt_embeds": NOTHING.expand(B, -1, -1), "negative_prompt_embeds_mask": EVERY_TOKEN,
        },
        rescale_patch=2,
        returns=lambda x, pipe: pack(x),
    ),
    "flux2": Case(
        lambda: tiny_nets.flux2(channels=16),
        lambda net: diffusers.Flux2KleinPipeline(flow(), tiny_nets.kl_flux2(), None, None, net),
        lambda: {
            "prompt_embeds": WORDS, "negative_prompt_embeds": NOTHING.expand(B, -1, -1), "guidance_scale": W,
            "latents": LATENTS.view(B, 16, 4, 4),
        },
        masked=False,
        side=16,
        returns=klein,
    ),
}  # fmt: skip
families = pytest.mark.parametrize("family", CASES)


def teacher_of(case: Case, net) -> DiffusersNet:
    teacher = DiffusersNet(net, *clock_of(flow()), arrival=False, guidance=False).eval().requires_grad_(False)
    teacher.empty = {"text": NOTHING} | ({"text_mask": EVERY_TOKEN[:1]} if case.masked else {})
    return teacher


@torch.no_grad()
def from_its_pipeline(family: str) -> float:
    """Euler with our guided velocity at the pipeline's sigmas against its own samples: see parity.relative."""
    case = CASES[family]
    net, call = case.net(), case.call()
    pipe = case.pipeline(tiny_pipelines.copied(net))
    pipe.set_progress_bar_config(disable=True)
    side = {"height": case.side, "width": case.side}
    given = call | {"latents": pack(call["latents"])} if family == "qwen_image" else call
    theirs = pipe(num_inference_steps=STEPS, output_type="latent", **side, **given).images
    teacher = ClassifierFree(NetworkTeacher(FlowMapNet(teacher_of(case, net))), rescale_patch=case.rescale_patch)
    x, cond = call["latents"], case.conditions() | {"guidance": torch.full((B,), W)}
    for t, s in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        x = x + (s - t) * teacher.velocity(x, t.expand(B), cond)
    return parity.relative(case.returns(x, pipe), theirs)


@families
def test_its_own_pipeline_samples_with_our_velocity(family):
    assert from_its_pipeline(family) < 1e-4


@families
def test_a_student_with_adapters_starts_as_its_teacher_trains_and_merges(family):
    case = CASES[family]
    teacher = teacher_of(case, case.net())
    student = FlowMapNet(add(teacher, LoRA(rank=3, targets=case.targets)))
    (x, t), cond = (case.call()["latents"], torch.tensor([0.3, 0.8])), case.conditions()
    cond["guidance"] = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        assert torch.equal(student.mean_velocity(x, t, t / 3, cond), teacher(x, t, t, cond))
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer, losses, target = torch.optim.Adam(trained, 1e-2), [], None
    for _ in range(3):
        value, rate = eulerian_derivative(student, x, t, t / 3, 0.5 * x, cond)
        if target is None:  # the gradient leaves the rate out: a loss that follows it may rise
            target = 0.5 * x - (2 * t / 3).view(-1, 1, 1, 1) * rate
        losses.append(((value - target) ** 2).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and all(p.grad is not None for p in trained)
    with torch.no_grad():
        whole = FlowMapNet(merged(student.net)).mean_velocity(x, t, t / 3, cond)
        assert parity.relative(whole, student.mean_velocity(x, t, t / 3, cond)) < 1e-5


@families
def test_recomputed_blocks_have_the_same_gradients(family):
    case, found = CASES[family], []
    for checkpointed in (False, True):
        student = FlowMapNet(add(teacher_of(case, case.net()), LoRA(rank=2, targets=case.targets)))
        student.checkpoint_activations(checkpointed)
        x, t = case.call()["latents"], torch.tensor([0.3, 0.8])
        value, rate = eulerian_derivative(student, x, t, t / 3, 0.5 * x, case.conditions())
        (value**2).sum().backward()
        found.append([rate, *(p.grad for p in student.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def add(teacher: DiffusersNet, lora: LoRA) -> DiffusersNet:
    net = teacher.with_branches(arrival=True, guidance=True)
    torch.manual_seed(1)
    add_lora(net, lora)
    return net.train()


@pytest.mark.parametrize("family", ["z_image", "lumina2"])
@pytest.mark.parametrize("sizes", [(5, 3), (32, 31), (33, 64)])
@torch.no_grad()
def test_captions_of_any_length_are_those_of_diffusers_own_forward(family, sizes):
    """Z-Image pads each caption to a multiple of 32 tokens, which it attends to."""
    net = CASES[family].net()
    ours = tiny_pipelines.copied(net)
    prepare(ours)
    text, x, t = numbers(B, max(sizes) + 2, TEXT), numbers(B, 4, 12, 10), torch.tensor([0.3, 0.8])
    mask = torch.arange(text.shape[1]) < torch.tensor(sizes).unsqueeze(1)
    if family == "z_image":
        theirs = -torch.stack(net(list(x.unsqueeze(2)), 1 - t, rows(text, mask)).sample).squeeze(2)
    else:
        theirs = -net(x, 1 - t, text, mask).sample
    got = CALLS[type(net).__name__](ours, x, 1000 * t, {"text": text, "text_mask": mask})
    assert parity.relative(got, theirs) < 1e-5

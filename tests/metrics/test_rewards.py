"""Rewards of pictures: values by hand, gradients, a classifier in a file, CLIP, and the trust rule for code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flowmap
from flowmap.base.schema import construct
from flowmap.flow.reward import Reward
from flowmap.metrics.rewards import CLIP, REWARDS, Classifier, Function, Ink, Symmetry, write_classifier
from flowmap.recipe.kinds import TABLES
from tests.support.oracle import draw, seeded
from tests.support.tiny_pipelines import two_towers


def layers(*sizes, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]


def test_ink_and_symmetry_by_hand():
    x = torch.full((2, 1, 4, 6), -1.0)
    x[1, :, :, :3] = 1.0
    assert Ink()(x).tolist() == [0.0, 0.5] and Ink()(3 * x).tolist() == [0.0, 0.5]
    assert Symmetry()(x).tolist() == [0.0, -4.0]
    y = draw().requires_grad_()
    for reward in (Ink(), Symmetry()):
        assert float(torch.autograd.grad(reward(y).sum(), y)[0].abs().max()) > 0


def test_a_classifier_says_the_probability_of_a_class(tmp_path):
    path, net = tmp_path / "judge.safetensors", layers(72, 16, 10)
    write_classifier(path, net)
    x, labels = draw(dtype=torch.float32), torch.tensor([3, 0, 9, 1, 3])
    wanted = torch.log_softmax(net[1](nn.functional.silu(net[0](x.flatten(1)))), 1)
    torch.testing.assert_close(Classifier(str(path))(x, {"class": labels}), wanted[torch.arange(5), labels])
    torch.testing.assert_close(Classifier(str(path), label=7)(x, {"class": labels}), wanted[:, 7])
    write_classifier(path, layers(72, 10, seed=1))
    assert not torch.equal(Classifier(str(path), label=7)(x, None), wanted[:, 7]), "a new file is read"


def test_mistakes_of_a_classifier_are_named(tmp_path):
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ValueError, match="judge.safetensors: there is no such file"):
        Classifier(str(path), 1)(draw(), None)
    write_classifier(path, layers(5, 10))
    with pytest.raises(ValueError, match="reads 5 numbers, and a sample has 72"):
        Classifier(str(path), 1)(draw(), None)
    write_classifier(path, layers(72, 10))
    for label, cond in ((None, {"class": torch.full((5,), -1)}), (10, None)):
        with pytest.raises(ValueError, match="reward.label: .* is not one of 0..9"):
            Classifier(str(path), label)(draw(), cond)
    with pytest.raises(ValueError, match="reward.label: is required"):
        Classifier(str(path))(draw(), None)


def test_code_is_named_only_from_what_the_command_line_allows(tmp_path):
    with pytest.raises(ValueError, match="reward.function: 'os:getpid' names code"):
        Function("os:getpid")(draw(), None)
    file = tmp_path / "my_reward.py"
    file.write_text("def bright(x, cond):\n    return x.flatten(1).mean(1)\n")
    flowmap.allow_import(str(file))
    assert torch.equal(Function("my_reward:bright")(draw(), None), draw().flatten(1).mean(1))


def test_every_kind_is_read_from_settings():
    settings = {"classifier": {"weights": "a"}, "function": {"function": "a:b"}, "clip": {"prompt": "a cat"}}
    for kind in REWARDS:
        plain = {"reward": {"kind": kind, **settings.get(kind, {})}}
        found = construct(TABLES[_sampler()]["tilted"], plain, TABLES, file="f")
        assert type(found.reward) is TABLES[Reward][kind]


def _sampler():
    from flowmap.flow.types import Sampler

    return Sampler


def test_clip_prefers_its_prompt_and_has_a_gradient(tmp_path):
    model = str(two_towers(tmp_path))
    x = (torch.rand(2, 1, 40, 40, generator=seeded()) * 2 - 1).requires_grad_()
    found = CLIP("a red cat", model)(x, None)
    assert found.shape == (2,) and not torch.equal(found, CLIP("a green dog", model)(x, None))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    better = CLIP("a red cat", model)((x + 0.5 * gradient.sign()).detach(), None)
    assert float(gradient.abs().max()) > 0 and bool((better != found).all())

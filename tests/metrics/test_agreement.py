"""A classifier agrees with classes of real samples and not with shuffled ones; captions are found in pictures."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from flowmap.data import Digits
from flowmap.metrics import Agreement, Retrieval, baselines
from flowmap.metrics.agreement import Ridge, below, sentences
from tests.support.oracle import draw, seeded


@pytest.fixture(scope="module")
def digits():
    return Digits().build()


def captioned(seed, n, noise=0.05, tells=True):
    """Pictures (n, 1, 4, 6) that are a linear function of one of 150 captions' embedding, or independent of it."""
    captions = F.normalize(draw(150, 16, seed=90))
    which = torch.randint(150, (n,), generator=seeded(seed))
    pictures = captions[which] @ draw(16, 24, seed=91) + noise * draw(n, 24, seed=seed)
    x = pictures if tells else draw(n, 24, seed=seed + 1)
    return x.reshape(n, 1, 4, 6).float(), {"pooled": 3 * captions[which].float()}


def at(cond):
    """The conditions at some places, as data sets give them."""
    return lambda places: {key: value[places] for key, value in cond.items()}


def scored(spec, real, cond, x, given):
    metric = spec.build(real, at(cond))
    metric.update(x[:7], {key: value[:7] for key, value in given.items()})
    metric.update(x[7:], {key: value[7:] for key, value in given.items()})
    return spec.report(metric)


def built(spec, data):
    return [(spec, spec.build_on(data))]


def test_classes_of_held_out_digits_and_of_shuffled_ones(digits):
    found = baselines(built(Agreement(), digits), digits)
    assert found["agreement_pixels"] > 0.97 and 0.03 < found["agreement_pixels_shuffled"] < 0.2
    assert baselines(built(Agreement(images=100), digits), digits)["agreement_pixels"] > 0.95


def test_no_class_does_not_count(digits):
    metric = Agreement(reference_images=500).build_on(digits)
    x, labels = digits.held_out[:20], digits.held_out_labels[:20].clone()
    labels[:8] = -1
    metric.update(x, {"class": labels})
    metric.update(x[:8], {"class": labels[:8]})
    assert metric.count == 12
    metric.reset()
    with pytest.raises(ValueError, match="no sample with a class"):
        metric.compute()


def test_classes_are_needed(digits):
    with pytest.raises(ValueError, match="two classes or more"):
        Agreement().build(digits.reference, at({"class": torch.zeros(1500, dtype=torch.int64)}))


def test_captions_that_pictures_tell_are_found():
    real, cond = captioned(0, 600)
    found = scored(Retrieval("pixels"), real, cond, *captioned(1, 200))
    assert list(found) == ["retrieval_top1_pixels", "retrieval_top5_pixels"]
    assert found["retrieval_top1_pixels"] > 0.95 and found["retrieval_top5_pixels"] > 0.99


def test_captions_that_pictures_do_not_tell_are_found_by_chance():
    real, cond = captioned(0, 600)
    x, given = captioned(1, 2000)
    for pictures in (captioned(1, 2000, tells=False)[0], x[torch.randperm(2000, generator=seeded(5))]):
        found = scored(Retrieval("pixels"), real, cond, pictures, given)
        assert found["retrieval_top1_pixels"] == pytest.approx(0.01, abs=0.007)
        assert found["retrieval_top5_pixels"] == pytest.approx(0.05, abs=0.015)


def test_one_prediction_for_all_is_no_better_than_chance():
    """Equal pictures, at the mean of the real ones: all captions are equally near, which counts against them."""
    real, cond = captioned(0, 600)
    _, given = captioned(1, 300)
    found = scored(Retrieval("pixels"), real, cond, real.mean(0, keepdim=True).expand(300, -1, -1, -1), given)
    assert found["retrieval_top1_pixels"] < 0.03 and found["retrieval_top5_pixels"] < 0.1


def test_the_floor_of_retrieval():
    real, cond = captioned(0, 600)
    held_out, own = captioned(3, 300)
    references = dict(reference=real, reference_conditions_at=at(cond))
    data = SimpleNamespace(**references, held_out=held_out, held_out_conditions_at=at(own))
    found = baselines(built(Retrieval("pixels"), data), data)
    assert found["retrieval_top1_pixels"] > 0.95 and found["retrieval_top1_pixels_shuffled"] < 0.04
    assert found["retrieval_top5_pixels_shuffled"] == pytest.approx(0.05, abs=0.04)
    none = SimpleNamespace(**references, held_out=held_out[:0], held_out_conditions_at=at({}))
    assert baselines(built(Retrieval("pixels"), none), none) == {}


def test_the_law_of_drawn_captions_is_that_of_drawing_them():
    marked, total, draws = torch.tensor([0.0, 3.0, 20.0, 30.0]), torch.tensor([30.0, 30.0, 30.0, 30.0]), 9
    found = below(marked.double(), total.double(), draws=draws, most=10)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))
    rounds = torch.stack([torch.randperm(30, generator=seeded(i))[:draws] for i in range(4000)])
    for row, m in zip(found, marked, strict=True):
        drawn = (rounds < m).sum(1)
        torch.testing.assert_close(
            row, torch.stack([(drawn == j).double().mean() for j in range(10)]), rtol=0, atol=0.03
        )


def test_few_different_captions_are_refused_and_so_are_none():
    real, cond = captioned(0, 80)
    with pytest.raises(ValueError, match="metrics.among: 100 wants more than 100 different captions"):
        Retrieval("pixels").build(real, at(cond))
    with pytest.raises(ValueError, match="needs conditions of text .pooled or text.; these are class"):
        Retrieval("pixels").build(real, at({"class": torch.zeros(80)}))
    with pytest.raises(ValueError, match=r"top: \(1, 100\) must lie in 1..99"):
        Retrieval(top=(1, 100))


def test_the_regression_finds_a_linear_law_and_no_law_in_noise():
    x, weights = draw(300, 12, seed=1), draw(12, 3, seed=2)
    fitted = Ridge(x, x @ weights + 2)
    torch.testing.assert_close(fitted(x[:9]), x[:9] @ weights + 2, rtol=0, atol=1e-2)
    noise = draw(300, 3, seed=3)
    away = Ridge(x, noise)(draw(500, 12, seed=4))
    assert (away - noise.mean(0)).std() < 0.1 * noise.std()


def test_the_left_out_error_is_that_of_leaving_each_out():
    from flowmap.metrics.agreement import _left_out_error

    x, y = draw(15, 4, seed=1), draw(15, 2, seed=2)
    x, y = x - x.mean(0), y - y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    found = _left_out_error(x @ vectors, values + 3.0, vectors.T @ (x.T @ y), y)
    errors = []
    for i in range(15):
        kept = torch.arange(15) != i
        xs, ys = x[kept] - x[kept].mean(0), y[kept] - y[kept].mean(0)
        w = torch.linalg.solve(xs.T @ xs + 3 * torch.eye(4, dtype=torch.float64), xs.T @ ys)
        errors.append(((x[i] - x[kept].mean(0)) @ w + y[kept].mean(0) - y[i]).square().sum())
    assert found == pytest.approx(float(torch.stack(errors).mean()))


def test_sentences_without_a_pooled_one_are_means_of_words():
    words, mask = draw(5, 4, 6), torch.arange(4) < torch.tensor([[4], [1], [2], [3], [4]])
    found = sentences({"text": words, "text_mask": mask})
    torch.testing.assert_close(found[1], F.normalize(words[1, 0], dim=0))
    torch.testing.assert_close(found[2], F.normalize(words[2, :2].mean(0), dim=0))
    torch.testing.assert_close(sentences({"text": words, "pooled": words[:, 0]}), F.normalize(words[:, 0]))

"""Reference statistics in a file: the figure is that of the direct way and of torchmetrics; bad files are refused."""

import importlib.util
import io
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from flowmap.base import trust
from flowmap.data import Dataset
from flowmap.metrics import Against, Frechet, baseline
from flowmap.metrics.features import build_features
from flowmap.metrics.statistics import Moments, Statistics, read_statistics

NAME = "features_of_this_test:Seven"


class Seven(nn.Module):
    """Seven random linear features of the bytes of a picture."""

    num_features = 7

    def forward(self, x):
        pixels = x if x.dtype == torch.uint8 else ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        mixing = torch.randn(pixels[0].numel(), 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return pixels.flatten(1).double() @ mixing / 255


@pytest.fixture(autouse=True)
def seven(monkeypatch):
    monkeypatch.setitem(trust._ALLOWED, "features_of_this_test", sys.modules[__name__])


def pictures(seed, n, shift=0.0, size=4):
    """Pictures whose values are bytes."""
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 0.3 + shift
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def file_of(x, path, name=NAME, **more):
    moments = Moments(7)
    for part in x.split(33):
        moments.add(build_features(name, x)(part))
    moments.statistics(**more).write(path)
    return str(path)


def figures(spec, data, samples):
    against = Against(spec, data)
    against.update(samples)
    return against.report()


def test_a_file_gives_the_figure_of_the_direct_way(tmp_path):
    data, samples = Dataset("two", pictures(0, 500), pictures(1, 200)), pictures(2, 300, 0.1)
    direct = figures(Frechet(NAME, 300), data, samples)
    path = file_of(data.train, tmp_path / "whole.npz", features="Seven")
    found = figures(Frechet(NAME, 300, reference=path), data, samples)
    assert list(found) == ["frechet_Seven", "frechet_Seven_train"]  # a file of the training set has its key
    assert found == pytest.approx(direct, rel=1e-10)
    path = file_of(data.held_out, tmp_path / "held_out.npz")
    found = figures(Frechet(NAME, 300, reference=path, reference_of="held_out"), data, samples)
    assert list(found) == list(direct) and found == pytest.approx(direct, rel=1e-10)


def test_a_file_alone_leaves_the_other_reference_out(tmp_path):
    data, samples = Dataset("one", pictures(0, 500), pictures(1, 0)), pictures(2, 300)
    path = file_of(data.train, tmp_path / "whole.npz")
    assert set(figures(Frechet(NAME, 300, reference=path), data, samples)) == {"frechet_Seven_train"}
    found = figures(Frechet(NAME, 300, reference=path, reference_of="held_out"), data, samples)
    assert set(found) == {"frechet_Seven", "frechet_Seven_train"}


def test_torchmetrics_gives_the_same_distance_to_a_file(tmp_path):
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = pictures(0, 600), pictures(1, 400, 0.2)
    twin = FrechetInceptionDistance(feature=Seven(), input_img_size=(3, 4, 4))
    to_bytes = lambda x: ((x + 1) * 127.5).round().to(torch.uint8)
    twin.update(to_bytes(real), real=True)
    twin.update(to_bytes(fake), real=False)
    path = file_of(real, tmp_path / "whole.npz")
    data = Dataset("two", pictures(3, 50), pictures(4, 0))  # the file alone counts, not the data's own samples
    found = figures(Frechet(NAME, 400, reference=path), data, fake)["frechet_Seven_train"]
    assert found == pytest.approx(float(twin.compute()), rel=1e-4) and found > 1


def test_a_known_shift_of_the_mean(tmp_path):
    """Features moved by d have the same covariance: the distance is |d|^2."""
    real = pictures(0, 500)
    features = build_features(NAME, real)(real)
    statistics, d = Moments(7), torch.arange(7).double()
    statistics.add(features + d)
    statistics.statistics().write(tmp_path / "moved.npz")
    spec = Frechet(NAME, 500, reference=str(tmp_path / "moved.npz"))
    found = figures(spec, Dataset("one", real, real[:0]), real)["frechet_Seven_train"]
    assert found == pytest.approx(float(d.square().sum()), rel=1e-9)


def test_moments_add_up_and_are_those_of_numpy():
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    parts = [Moments(7), Moments(7)]
    for moments, rows in zip(parts, (x[:120], x[120:]), strict=True):
        for part in rows.split(50):
            moments.add(part)
    found = parts[0].plus(parts[1]).statistics()
    assert found.count == 300
    np.testing.assert_allclose(found.mean.numpy(), x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_the_floor_uses_the_number_of_pictures_in_the_file(tmp_path):
    """The bias law with n of the file: 1/n + 1/m, and 1/m where the file does not state n."""
    data = Dataset("two", pictures(0, 300), pictures(1, 100))
    path = file_of(pictures(2, 4000), tmp_path / "whole.npz")
    counted = baseline(Against(Frechet(NAME, 800, reference=path), data), data)
    arrays = dict(np.load(path))
    np.savez(tmp_path / "without.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    without = baseline(Against(Frechet(NAME, 800, reference=str(tmp_path / "without.npz")), data), data)
    law = lambda rest: (rest + 1 / 800) / (rest + 1 / 80)  # a draw has 80 of the 100 held-out samples
    ratio = counted["frechet_Seven_train"] / without["frechet_Seven_train"]
    assert ratio == pytest.approx(law(1 / 4000) / law(0), rel=1e-6)
    assert counted["frechet_Seven"] == pytest.approx(without["frechet_Seven"])


def test_files_of_other_makers_are_read(tmp_path):
    """ADM's have pictures and more under other keys, float32 is allowed, and what is written is read back."""
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(
        tmp_path / "adm.npz", mu=mean, sigma=covariance.astype("f4"), mu_s=mean, arr_0=np.zeros((2, 4, 4, 3), "u1")
    )
    found = read_statistics(tmp_path / "adm.npz")
    assert found.mean.dtype == found.covariance.dtype == torch.float64 and found.count is None and found.width == 3
    ours = Statistics(torch.tensor(mean), torch.tensor(covariance), 50_000, "inception", "zip")
    ours.write(tmp_path / "folder" / "ours.npz")
    again = read_statistics(tmp_path / "folder" / "ours.npz")
    assert (again.count, again.features, again.identity) == (50_000, "inception", "zip")
    assert again.mean.equal(ours.mean) and again.covariance.equal(ours.covariance)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["ours.npz"]


def saved(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


M, S = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (saved(mu=M), "has no sigma; a reference has mu"),
        (saved(fid=M), "has no mu and no sigma"),
        (saved(mu=M, sigma=np.eye(4)), r"mu is \(3,\) float64, sigma \(4, 4\) float64; allowed: \(D,\) and \(D, D\)"),
        (saved(mu=M[None], sigma=S), r"mu is \(1, 3\)"),
        (saved(mu=M.astype(int), sigma=S), "int64.*allowed: floating-point numbers"),
        (saved(mu=M + np.nan, sigma=S), "not finite"),
        (saved(mu=M, sigma=S + np.triu(np.ones((3, 3)), 1)), "not symmetric"),
        (saved(mu=M, sigma=-S), "variance below 0"),
        (saved(mu=np.array([object()]), sigma=S), "cannot be read: Object arrays"),
        (saved(mu=M, sigma=S)[:-80], "is no .npz: save mu and sigma"),
        (pickle.dumps({"fid": {"mu": M}}), "is no .npz: save mu and sigma with numpy.savez"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_statistics(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_of_edm2_is_refused_and_never_read(tmp_path):
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps({"fid": {"mu": M, "sigma": S}}))
    with pytest.raises(ValueError, match="a pickle, such as EDM2's .pkl, is not read: save mu and sigma"):
        read_statistics(tmp_path / "img512.pkl")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(features="pixels", reference="a.npz"), "reference: features 'pixels' are fitted to the training samples"),
        (dict(features="inception", reference="a.npz", reference_images=5), "reference_images: 5 draws from"),
        (dict(features="inception", reference="a.npz", reference_of="coco"), "'coco' is not one of train, held_out"),
        (dict(features="inception", reference_of="held_out"), "describes a file, and reference is null"),
        (dict(features="inception", reference="auto", reference_of="held_out"), "'held_out' wants a file"),
        (dict(features="pixels", weights="a.pth"), "weights: features 'pixels' read none"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Frechet(**settings)


def test_the_check_comes_before_any_sample_is_drawn(tmp_path):
    missing = Frechet(NAME, reference=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="metrics: reference: .*a.npz: there is no such file; `flowmap reference`"):
        missing.check()
    path = file_of(pictures(0, 50), tmp_path / "b.npz", features="inception")
    with pytest.raises(ValueError, match="is of features 'inception', not 'features_of_this_test:Seven'"):
        Frechet(NAME, reference=path).check()
    np.savez(tmp_path / "c.npz", mu=M, sigma=S)
    spec, data = Frechet(NAME, reference=str(tmp_path / "c.npz")), Dataset("one", pictures(0, 50), pictures(1, 0))
    spec.check()  # nothing says how many features such a space has
    with pytest.raises(ValueError, match="is of 3 features, and 'features_of_this_test:Seven' has 7"):
        Against(spec, data)
    Frechet(NAME, reference="auto").check()
    with pytest.raises(ValueError, match="auto names no file yet"):
        Against(Frechet(NAME, reference="auto"), data)


needs_fidelity = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")


@pytest.mark.slow  # eigenvalues of 2,048 x 2,048, twice
@needs_fidelity
def test_inception_with_random_weights_is_torchmetrics_fid(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):  # keep the random weights
            return None

    weights = tmp_path / "random.pth"
    torch.save({}, weights)
    torch.manual_seed(0)
    torch.save(Blank("inception-v3-compat", ["2048"], str(weights)).state_dict(), weights)
    real, fake = pictures(0, 12, size=16), pictures(1, 10, 0.5, size=16)
    twin = FrechetInceptionDistance(NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=False))
    twin.inception.num_features = 2048
    to_bytes = lambda x: ((x + 1) * 127.5).round().to(torch.uint8)
    twin.update(to_bytes(real), real=True)
    twin.update(to_bytes(fake), real=False)
    spec = Frechet("inception", 10, weights=str(weights))
    found = figures(spec, Dataset("one", real, real[:0]), fake)["frechet_inception_train"]
    assert found == pytest.approx(float(twin.compute()), rel=1e-4) and found > 0
    np.savez(tmp_path / "c.npz", mu=M, sigma=S)
    with pytest.raises(ValueError, match="is of 3 features, and 'inception' has 2048"):
        Frechet("inception", weights=str(weights), reference=str(tmp_path / "c.npz")).check()


@needs_fidelity
def test_inceptions_file_is_never_unpickled(tmp_path):
    """torch-fidelity itself reads its file with weights_only=False."""
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(print))
    for name, says in (
        ("evil.pth", "holds more than weights, or is torn"),
        ("none.pth", "none.pth; none are downloaded"),
    ):
        with pytest.raises(ValueError, match=says):
            build_features("inception", pictures(0, 2), weights=str(tmp_path / name))

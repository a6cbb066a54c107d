"""Reference statistics of all training pictures: those of one pass, whichever process makes them, cut off or not."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flowmap.base import trust
from flowmap.base.images import from_bytes
from flowmap.metrics.frechet import gaussian_frechet
from flowmap.metrics.statistics import Moments, read_statistics
from flowmap.plan.references import ReferenceStatistics, located, references_of
from flowmap.prepare import reference
from flowmap.prepare.reference import make_reference
from flowmap.recipe import read_recipe
from flowmap.train.fit import fit
from tests.support.encoding import Numbers, spec

FIVE = "features_of_references:five"
seen: list[int] = []


def five(x):
    """Five random linear features."""
    seen.append(len(x))
    mixing = torch.randn(x[0].numel(), 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x.flatten(1).double() @ mixing


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(trust._ALLOWED, "features_of_references", sys.modules[__name__])
    monkeypatch.setattr(reference, "MIN_ITEMS", 5)
    monkeypatch.setattr(reference, "STREAM_ITEMS", 5)
    seen.clear()


def stage(**images):
    return ReferenceStatistics(SimpleNamespace(name="numbers", data=spec(images=Numbers(**images))), FIVE)


def in_one_pass(images):
    moments = Moments(5)
    moments.add(five(torch.stack([from_bytes(item.image) for item in images.items() if item.image is not None])))
    return moments.statistics()


@pytest.mark.parametrize("stream", [False, True])
def test_all_usable_pictures_count_once(stream):
    wanted, log = in_one_pass(Numbers()), []
    found = make_reference(stage(stream=stream), batch_size=3, log=log.append)
    assert found.count == len(Numbers().usable) == 20 and found.features == "five"
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-12, atol=1e-12)
    assert log[-1] == "3 pictures left out: number 3 is broken; number 10 is broken; number 17 is broken"
    folder = stage(stream=stream).folder
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "statistics.npz"]  # no parts, no locks
    assert read_statistics(folder / "statistics.npz").mean.equal(found.mean)
    assert json.loads(found.identity)["pictures"]["count"] == 23
    seen.clear()
    assert make_reference(stage(stream=stream)).mean.equal(found.mean) and not seen  # a second call reads the file


def test_processes_make_what_one_makes(tmp_path, monkeypatch):
    whole = make_reference(stage(), batch_size=3)
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "other"))
    assert make_reference(stage(), shard=(1, 2), batch_size=3) is None and not stage().complete
    found = make_reference(stage(), shard=(0, 2), batch_size=3)
    assert found.mean.equal(whole.mean) and found.covariance.equal(whole.covariance)
    assert make_reference(stage(), shard=(1, 2), batch_size=3).mean.equal(whole.mean)


def test_a_second_call_completes_what_was_cut_off(monkeypatch):
    whole, parts = in_one_pass(Numbers()), 0
    written = reference.write_shard

    def cut(*arguments):
        nonlocal parts
        parts += 1
        if parts == 3:
            raise KeyboardInterrupt
        return written(*arguments)

    monkeypatch.setattr(reference, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        make_reference(stage(), batch_size=3)
    seen.clear()
    found = make_reference(stage(), batch_size=3)
    assert 0 < sum(seen) < 20 and found.count == 20  # the two parts that are there are not made again
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_other_pictures_have_another_folder_and_changed_ones_are_refused(monkeypatch):
    make_reference(stage(), batch_size=3)
    assert stage(count=24).folder != stage().folder != replace(stage(), features="inception").folder
    assert replace(stage(), recipe=SimpleNamespace(name="b", data=spec(images=Numbers(), held_out=5))).complete
    monkeypatch.setattr(Numbers, "fingerprint", lambda self: "changed")
    with pytest.raises(ValueError, match="its source has changed since it was begun: fingerprint"):
        make_reference(stage())


def test_fitted_features_and_data_without_pictures_are_refused():
    with pytest.raises(ValueError, match="reference: features 'pixels' are fitted to the training samples"):
        replace(stage(), features="pixels")
    latents = SimpleNamespace(name="latents", data=SimpleNamespace(images=None, in_pixels=False))
    with pytest.raises(ValueError, match="latents: metrics: reference: auto is of pictures, and data has none"):
        ReferenceStatistics(latents, FIVE).folder  # noqa: B018


AUTO = f"metrics=[{{kind: frechet, features: '{FIVE}', images: 100, reference: auto}}]"


def test_fit_makes_the_statistics_first_and_keeps_them(tiny, tmp_path):
    """The toy's reference is its whole training set: the figures are those without a file."""
    (tmp_path / "one").mkdir()
    recipe = read_recipe(tiny, [AUTO])
    (made,) = references_of(recipe)
    assert located(recipe, recipe.metrics)[0].reference == str(made.file)
    log = []
    found = fit(recipe, tmp_path / "one", log=log.append).metrics
    assert any(line.startswith("[1/2] tiny: its pictures -> statistics of five") for line in log)
    plain = read_recipe(tiny, [AUTO.replace(", reference: auto", "")])
    direct = fit(plain, tmp_path / "two", log=lambda line: None).metrics
    for row in ("1", "2"):
        assert found["student"][row] == pytest.approx(direct["student"][row], rel=1e-10)
    assert found["floor"] == pytest.approx(direct["floor"], rel=1e-10)
    log.clear()
    fit(recipe, tmp_path / "three", log=log.append)
    assert log[0] == f"[1/2] tiny: complete in {made.folder}"


def test_the_command(tiny, tmp_path, command):
    settings = ("--recipe", tiny, AUTO, "--import", "tests.prepare.test_reference")
    settings = (*settings[:2], AUTO.replace("features_of_references", "tests.prepare.test_reference"), *settings[3:])
    code, out, err = command("fit", *settings, "--dry-run")
    assert code == 0 and "[1/2] tiny: its pictures -> statistics of five" in out, err
    code, out, err = command("reference", *settings, "--out", tmp_path / "mine.npz", "--shard", "0/1")
    assert code == 0 and out == f"{tmp_path / 'mine.npz'}: 500 pictures, 5 features of five\n", err
    assert read_statistics(tmp_path / "mine.npz").count == 500
    code, out, err = command("fit", *settings, "--dry-run")
    assert "[1/2] tiny: complete" in out
    code, out, err = command("reference", "--recipe", tiny, "--features", "pca")
    assert code == 2 and "reference: features 'pca' are fitted to the training samples; allowed: inception" in err


def test_statistics_that_are_gone_are_one_line(tiny, tmp_path, command):
    run = fit(read_recipe(tiny, [AUTO]), tmp_path / "one", log=lambda line: None)
    (made,) = references_of(read_recipe(tiny, [AUTO]))
    made.file.unlink()
    code, _, err = command("evaluate", "--student", run.folder / "student")
    assert code == 2 and err.count("\n") == 1 and "there is no such file; `flowmap reference` makes one" in err


def test_the_distance_of_two_halves_is_that_of_their_statistics():
    """A file made by the command is used as it is: no count or scale enters the distance."""
    first, second = (make_reference(stage(count=count), batch_size=3) for count in (23, 30))
    found = gaussian_frechet(first.mean, first.covariance, second.mean, second.covariance)
    ours = [in_one_pass(Numbers(count=count)) for count in (23, 30)]
    wanted = gaussian_frechet(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

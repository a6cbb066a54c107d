"""Frozen diffusers autoencoders, tiny and random: normalisation is inverted, and errors are one line."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flowmap.teachers.autoencoder import Autoencoder
from tests.support import tiny_nets

diffusers = pytest.importorskip("diffusers")


def kl(folder, seed=0, **more):
    torch.manual_seed(seed)
    model = tiny_nets.kl(latent_channels=3, **more)
    model.save_pretrained(folder)
    return model.eval()


def test_latents_are_the_posteriors_mean_normalised_and_decode_undoes_it(tmp_path):
    model = kl(tmp_path, scaling_factor=0.5, shift_factor=0.1)
    frozen = Autoencoder(source=str(tmp_path)).load()
    x = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    z = frozen.encode(x)
    with torch.no_grad():
        mean = model.encode(x).latent_dist.mode()
        torch.testing.assert_close(z, (mean - 0.1) * 0.5)
        torch.testing.assert_close(frozen.decode(z), model.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_normalisation_by_channel_from_the_recipe_or_the_model(tmp_path):
    """(z - latents_mean) scaling_factor / latents_std, as diffusers' SDXL pipelines have it."""
    kl(tmp_path, latents_mean=[0.1, 0.2, 0.3], latents_std=[1.0, 2.0, 4.0], scaling_factor=0.5)
    theirs = Autoencoder(source=str(tmp_path)).load()
    ours = Autoencoder(source=str(tmp_path), shift=(0.1, 0.2, 0.3), scale=(0.5, 0.25, 0.125)).load()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(theirs.encode(x), ours.encode(x))
    assert theirs.identity() == ours.identity()


def test_the_identity_changes_with_weights_and_normalisation(tmp_path):
    kl(tmp_path / "a")
    kl(tmp_path / "b", seed=1)
    a, b = Autoencoder(source=str(tmp_path / "a")), Autoencoder(source=str(tmp_path / "b"))
    assert a.identity() == a.load().identity() and a.identity()["weights"] != b.identity()["weights"]
    assert Autoencoder(source=str(tmp_path / "a"), scale=(2.0,)).identity()["scale"] == [2.0]


def test_a_pipelines_folder_will_do(tmp_path):
    kl(tmp_path / "vae")
    assert Autoencoder(source=str(tmp_path)).load().model.config.latent_channels == 3


def test_other_classes_of_autoencoders(tmp_path):
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")
    tiny_nets.dc().save_pretrained(tmp_path / "dc")
    tiny_nets.kl_qwen().save_pretrained(tmp_path / "of videos")
    for name in ("tiny", "dc", "of videos"):
        frozen = Autoencoder(source=str(tmp_path / name)).load()
        z = frozen.encode(torch.zeros(2, 3, 16, 16))
        assert z.shape[:2] == (2, 4) and frozen.decode(z).shape == (2, 3, 16, 16)


def test_a_picture_is_one_frame_of_an_autoencoder_of_videos(tmp_path):
    torch.manual_seed(0)
    model = tiny_nets.kl_qwen().eval()
    model.save_pretrained(tmp_path)
    spec, x = Autoencoder(source=str(tmp_path)), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    frozen = spec.load()
    assert spec.outline() == (4, 4)
    with torch.no_grad():
        mean = model.encode(x.unsqueeze(2)).latent_dist.mode()
        own, std = (torch.tensor(model.config[f"latents_{what}"]).view(-1, 1, 1) for what in ("mean", "std"))
        torch.testing.assert_close(frozen.encode(x), (mean.squeeze(2) - own) / std)
        torch.testing.assert_close(frozen.decode(frozen.encode(x)), model.decode(mean).sample.squeeze(2))


def test_what_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    kl(tmp_path / "a")
    wan = dict(base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    diffusers.AutoencoderKLWan(**wan).save_pretrained(tmp_path / "wan")
    for spec, says in (
        (Autoencoder(source=str(tmp_path / "empty")), "is no diffusers autoencoder"),
        (Autoencoder(source="nobody/nothing", revision="abc"), "as a hub id at revision abc"),
        (Autoencoder(source=str(tmp_path / "a"), scale=(1.0, 2.0)), "2 numbers; allowed: 1 or 3"),
        (Autoencoder(recipe="emoji32-autoencoder"), "is trained first"),
        (Autoencoder(source=str(tmp_path / "wan")), "AutoencoderKLWan is an autoencoder of videos; of"),
    ):
        if "videos" in says:  # known from its config
            with pytest.raises(ValueError, match=says):
                spec.outline()
        with pytest.raises(ValueError, match=says) as caught:
            spec.load()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="exactly one of source"):
        Autoencoder()
    with pytest.raises(ValueError, match="scale.* must be above 0"):
        Autoencoder(source="x", scale=(0.0,))


def test_pictures_on_the_unit_interval(tmp_path):
    model = kl(tmp_path)
    frozen = Autoencoder(source=str(tmp_path), unit=True, scale=(1.0,)).load()
    x = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(frozen.encode(x), model.encode((x + 1) / 2).latent_dist.mode())
        z = frozen.encode(x)
        torch.testing.assert_close(frozen.decode(z), 2 * model.decode(z).sample - 1)
    assert frozen.identity() != Autoencoder(source=str(tmp_path), scale=(1.0,)).identity()

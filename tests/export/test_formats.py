"""Every network in every format of `flowmap export` gives the student's samples, or is refused for a known reason."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("onnxruntime")
from tests.support.formats import ADAPTERS, FORMATS, NETWORKS, NO_STOCK, lora_student, measured, spec_of  # noqa: E402

TOLERANCE = 1e-4  # kernels of other programs sum in another order, in float32
REFUSED = {  # what a refusal may say, by format; the others have no refusals
    **dict.fromkeys(("stock", *ADAPTERS), re.escape(NO_STOCK)),
    "lora-comfyui": f"({re.escape(NO_STOCK)}|--to lora-comfyui: .*the original names of .* are not known)",
    "onnx": "--to onnx: this network has no ONNX form: .*",
}


def check(found):
    for one, value in found.items():
        if isinstance(value, str):
            assert re.match(REFUSED.get(one, "never"), value), (one, value)
        else:
            assert value < TOLERANCE, (one, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_its_samples_in_every_format_or_is_refused(tmp_path, name):
    check(measured(name, tmp_path / "made"))


def test_a_space_and_a_file_for_comfyui_have_the_students_weights(tmp_path):
    found = measured("FluxTransformer2DModel", tmp_path / "made", ("lora-comfyui", "space"))
    assert set(found) < set(FORMATS) and all(isinstance(value, float) for value in found.values())
    check(found)


def test_the_guider_of_a_hunyuan_image_base_does_not_guide_its_loras(tmp_path):
    """As published, the base has an AdaptiveProjectedMixGuidance at a scale of 3.5, which no argument turns off."""
    import diffusers

    from flowmap.export import export
    from flowmap.export.stock import FAMILIES
    from tests.export.alone import snippet

    name = "HunyuanImageTransformer2DModel"
    student = lora_student(spec_of(name), tmp_path / "base")
    empty = dict.fromkeys(("vae", *FAMILIES[name].empty))
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base", **empty).guider.guidance_scale == 3.5
    given = f'"{tmp_path / "base"}", **dict.fromkeys({tuple(empty)})'
    for to in ("lora", "lora-peft"):
        code = snippet(export(student, tmp_path / to, to=to, steps=2, guidance=2.5))
        names: dict = {}
        exec(code.partition("images = ")[0].replace('"path/to/the/base/pipeline"', given), names)
        assert names["pipe"].guider is None and names["pipe"].ocr_guider is None, to

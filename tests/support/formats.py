"""Every network of every_net.SMALL in every format of `flowmap export`: how far its samples are from the student's own.

The network is tiny and has random weights. Another Python, without flowmap, draws the samples, by the lines of the
export's card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from flowmap.base.files import read_tensors
from flowmap.export import export
from flowmap.export.lora import COMFY_WEIGHTS, adapter_weights
from flowmap.export.original_names import original_layer
from flowmap.export.plan import make_plan
from flowmap.export.program import example_conditions
from flowmap.export.stock import FAMILIES, has_stock
from flowmap.flow.types import Cond
from flowmap.nets.diffusers_calls import pack, unpack
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import Base, LoRA, fingerprint, load_base
from flowmap.samplers import Deterministic
from flowmap.student.config import Pixels, StudentConfig
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from tests.export.alone import alone, shaken, snippet
from tests.support.every_net import SMALL
from tests.support.families import Built
from tests.support.parity import relative
from tests.support.tiny_nets import with_random_weights

FORMATS: Mapping[str, tuple[dict, str]] = {
    "stock": ({"to": "diffusers"}, "diffusers"),
    "own code": ({"to": "diffusers", "custom": True}, "diffusers, trust_remote_code"),
    "torch": ({"to": "torch"}, "torch.export.load"),
    "onnx": ({"to": "onnx"}, "onnxruntime"),
    "lora": ({"to": "lora"}, "diffusers, load_lora_weights"),
    "lora-peft": ({"to": "lora-peft"}, "peft, PeftModel"),
    "lora-comfyui": ({"to": "lora-comfyui"}, "ComfyUI (its matrices are compared)"),
    "space": ({"to": "space"}, "flowmap"),
}
"""The options of an export, and what reads it."""
NETWORKS = tuple(name for name, sized in SMALL.items() if isinstance(sized.build, Built) and not sized.build.more)
"""The networks of students: those that a recipe's settings build, from noise to samples that are no sentences."""
STEPS, SCALE, ROWS, CLASSES = 2, 2.5, 2, {"DiTTransformer2DModel": 10}
ADAPTERS = ("lora", "lora-peft", "lora-comfyui")
GUIDERS = {"HunyuanImagePipeline": ("guider", "ocr_guider")}  # of a base, at a scale of 3.5
NO_STOCK = "there is no stock pipeline for this network on this schedule"
SCRIPT = """
import json, warnings
warnings.simplefilter("ignore")  # peft's, on layers without a bias
given = torch.load("given.pt")
noise, packed, cond = given["noise"], given["packed"], given["cond"]
text = cond.get("text")
mask = None if text is None else torch.ones(text.shape[:2], dtype=torch.long)
embeds = {"prompt_embeds": text, "prompt_attention_mask": mask, "prompt_embeds_mask": mask}
for job in json.load(open("jobs.json")):
    names = {**embeds, "pooled_prompt_embeds": cond.get("pooled")}
    try:
        load, call, rest = job["code"].partition("images = pipe(")
        exec(load, names)
        if job["format"] == "torch":
            images = names["program"](noise, cond)
        elif job["format"] == "onnx":
            arrays = {key: value.numpy() for key, value in {"noise": noise, **cond}.items()}
            images = torch.from_numpy(names["session"].run(None, arrays)[0])
        else:
            names["latents"] = packed if hasattr(names["pipe"], "_pack_latents") else noise
            exec(call + rest.replace("num_inference_steps", "latents=latents, num_inference_steps"), names)
            images = names["images"]
        torch.save(images, job["format"] + ".pt")
    except Exception as error:
        open(job["format"] + ".txt", "w").write(f"failed: {type(error).__name__}: {error}")
"""


def spec_of(name: str) -> StudentConfig:
    """The configuration of a student of that network."""
    built = SMALL[name].build
    assert isinstance(built, Built)
    classes = built.options.get("num_classes", CLASSES.get(name))
    return StudentConfig(
        built.settings(), Deterministic(), built.shape, num_classes=classes, guidance=(1.0, 3.0, 2.0),
        samples=Pixels(clamp=False),
    )  # fmt: skip


def lora_student(config: StudentConfig, at: Path) -> Student:
    """A LoRA student with random adapters and branches, and its stock base pipeline in `at`."""
    spec = config.net
    assert isinstance(spec, DiffusersModel)
    torch.manual_seed(0)
    model = with_random_weights(spec.build((), arrival=False).model.eval(), 0.15)
    family, scheduler = FAMILIES[type(model).__name__], getattr(diffusers, spec.scheduler)()
    parts = {"transformer": model, "scheduler": scheduler, "vae": None, **dict.fromkeys(family.empty)}
    for part in ("transformer", "scheduler"):
        parts[part].save_pretrained(at / part)
    guiders = {name: diffusers.AdaptiveProjectedMixGuidance() for name in GUIDERS.get(family.pipeline, ())}
    for part, guider in guiders.items():
        guider.save_pretrained(at / part)
    pipe = getattr(diffusers, family.pipeline)(**parts, **guiders)
    pipe.save_config(at)  # model_index.json, which names the empty parts too
    lora, base = LoRA(2, 5.0, ("to_q", "to_k", "to_v")), Base(str(at), None, fingerprint(model))
    config = StudentConfig(**{**vars(config), "lora": lora, "base": base})
    flow_map = config.build(load_base(base, spec)).eval()
    for parameter in flow_map.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.detach() + 0.3 * torch.randn_like(parameter)
    return Student(config, flow_map.requires_grad_(False))


def inputs(student: Student) -> tuple[Tensor, Cond]:
    """Noise and random conditions of ROWS samples."""
    generator = torch.Generator().manual_seed(1)
    example, _ = example_conditions(make_plan(student, STEPS, SCALE, merge=False))
    cond = {
        key: torch.randn(ROWS, *value.shape[1:], generator=generator) if value.is_floating_point() else value[:ROWS]
        for key, value in example.items()
    }
    cond |= {"guidance": torch.full((ROWS,), SCALE)} if "guidance" in cond else {}
    return torch.randn(ROWS, *student.config.shape, generator=generator), cond


def measured(name: str, at: Path, formats: tuple[str, ...] = tuple(FORMATS)) -> dict[str, float | str]:
    """By format the largest relative difference from the student's samples, or in words why there is none.

    The exports are in folders below `at`.
    """
    at.mkdir(parents=True, exist_ok=True)
    found: dict[str, float | str] = {}
    config, jobs = spec_of(name), []
    plain = shaken(config)
    stock = has_stock(make_plan(plain, STEPS, SCALE))
    adapted = lora_student(config, at / "base") if stock and any(one in formats for one in ADAPTERS) else plain
    students = {one: adapted if one in ADAPTERS else plain for one in formats}
    for one in formats:
        if one in ("stock", *ADAPTERS) and not stock:
            found[one] = NO_STOCK
            continue
        try:
            given = {} if one == "space" else {"steps": STEPS, "guidance": SCALE}
            folder = export(students[one], at / one, **FORMATS[one][0], **given)
        except ValueError as error:
            found[one] = str(error).splitlines()[0]
            continue
        if (check := CHECKS.get(one)) is not None:
            found[one] = check(students[one], folder)
        else:
            jobs.append({"format": one, "code": _code(one, students[one], at)})
    noise, cond = inputs(plain)
    packed = pack(noise) if noise.ndim == 4 and not noise.shape[-1] % 2 else noise
    torch.save({"noise": noise, "packed": packed, "cond": cond}, at / "given.pt")
    (at / "jobs.json").write_text(json.dumps(jobs))
    if jobs:
        alone(SCRIPT, at)
    for one in [job["format"] for job in jobs]:
        failed = at / f"{one}.txt"
        found[one] = failed.read_text() if failed.exists() else _from(students[one], at / f"{one}.pt", noise, cond)
    return {one: found[one] for one in formats}


def _code(one: str, student: Student, at: Path) -> str:
    """The lines of the export's card that load and call it. Adapters are loaded on a base without text encoders."""
    if one not in ADAPTERS:
        return snippet(at / one)
    spec = student.config.net
    assert isinstance(spec, DiffusersModel)
    empty = ("vae", *FAMILIES[spec.network].empty)
    base = f'from_pretrained("{at / "base"}", **dict.fromkeys({empty}))'
    code = snippet(at / "lora").replace('from_pretrained("path/to/the/base/pipeline")', base)
    if one == "lora-peft":  # its card has the loading alone; scheduler and call are those of diffusers' LoRA
        loading = snippet(at / one).replace('from_pretrained("path/to/the/base/pipeline")', base)
        scheduler = code[code.index("pipe.scheduler = ") :]
        code = "\n".join([code.partition("\n")[0], loading, scheduler])
    return code


@torch.no_grad()
def _from(student: Student, path: Path, noise: Tensor, cond: Cond) -> float:
    wanted = student.config.sampler(student.flow_map, noise, cond, steps=STEPS)
    got = torch.load(path)
    return relative(unpack(got, *(n // 2 for n in noise.shape[2:])) if got.ndim < wanted.ndim else got, wanted)


def _from_matrices(student: Student, folder: Path) -> float:
    """The products of the file's matrices against those of the adapters, layer by layer of the original checkpoint."""
    ours, theirs = adapter_weights(make_plan(student, STEPS, SCALE, merge=False)), read_tensors(folder / COMFY_WEIGHTS)
    model, worst = student.flow_map.net.model, 0.0
    network = type(model).__name__
    for name in (key.removesuffix(".lora_A.weight") for key in ours if key.endswith(".lora_A.weight")):
        product = ours[f"{name}.lora_B.weight"] @ ours[f"{name}.lora_A.weight"]
        layer, parts = original_layer(network, name)
        if not product.any():  # the time embedding's, which has a bias alone
            continue
        down, up = (theirs[f"diffusion_model.{layer}.lora_{way}.weight"] for way in ("down", "up"))
        fused = float(theirs[f"diffusion_model.{layer}.alpha"]) / len(down) * up @ down
        sizes = [model.get_submodule(part).out_features for part in parts]
        worst = max(worst, relative(fused.split(sizes)[parts.index(name)], product))
    return worst


def _from_space(student: Student, folder: Path) -> float:
    noise, cond = inputs(student)
    wanted, got = (
        one.config.sampler(one.flow_map, noise, cond, steps=STEPS)
        for one in (student, load_student(folder / "student"))
    )
    return relative(got, wanted)


CHECKS: dict[str, Callable[[Student, Path], float]] = {"lora-comfyui": _from_matrices, "space": _from_space}
"""What is compared in this process."""

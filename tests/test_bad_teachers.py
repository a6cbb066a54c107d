"""Pretrained teachers that cannot work are refused on the command line.

Each gives one line and exit code 2.  Nothing is started and no foreign code runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import flowmap
from tests.conftest import bytes_of

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")

from tests.support import tiny_nets, tiny_pipelines  # noqa: E402

RECIPE = """
name: words
data:
  kind: encoded
  batch_size: 4
  held_out: 3
  reference_images: 8
  shard_items: 5
  root: {root}/latents
  images: {{kind: folder, root: {root}/pictures, size: 16}}
  autoencoder: {{kind: diffusers, source: {root}/pipe}}
  text: {{kind: pipeline, source: {root}/pipe, max_tokens: 12}}
teacher: {{card: {root}/card.yaml, guidance: {{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}}}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd, warmup_steps: 2}}
trainer: {{steps: 2, accelerator: cpu}}
metrics: [{{kind: frechet, features: pixels, images: 8, reference_images: 8}}]
log: {{wandb: false}}
"""
SCHEDULER, INDEX, VAE = "scheduler/scheduler_config.json", "model_index.json", "vae/config.json"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.save("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture
def place(tmp_path, pipe, monkeypatch) -> Path:
    """A folder with a text pipeline, captioned pictures, a card and a recipe, all of them valid.

    Code in the pipeline's folder records whether it was run.
    """
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLOWMAP_WEIGHTS", str(tmp_path / "weights"))
    shutil.copytree(pipe, tmp_path / "pipe")
    for folder in ("", "unet", "text_encoder", "vae", "scheduler"):
        for name in ("evil", "pipeline"):
            (tmp_path / "pipe" / folder / f"{name}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        PIL.new("RGB", (20, 16 + i), (20 * i, 255 - 20 * i, 100)).save(tmp_path / "pictures" / f"{i:02d}.png")
        (tmp_path / "pictures" / f"{i:02d}.txt").write_text(f"a red cat {i % 10}")
    (tmp_path / "card.yaml").write_text(f"kind: diffusers\nsource: {tmp_path / 'pipe'}\nshape: [4, 8, 8]\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
    return tmp_path


def refused(place: Path, result: tuple[int, str, str], says: str) -> None:
    """Exit 2, the last line says it, and nothing was begun, nor foreign code run."""
    code, _, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("flowmap: ") and says in last, (code, err)
    assert "Traceback" not in err and len(last) < 700
    assert (
        not any(path.is_file() for name in ("out", "runs") for path in (place / name).rglob("*"))
        and not (place / "RAN").exists()
    )


def fit(place: Path, command, *more):
    return command("fit", "--recipe", place / "recipe.yaml", "--out", place / "out", *more)


def encode(place: Path, command):
    return command("encode", "--recipe", place / "recipe.yaml")


def edit(path: str, **values):
    """Those keys of a JSON file of the pipeline's."""

    def change(place: Path) -> None:
        file = place / "pipe" / path
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def card(old: str, new: str):
    def change(place: Path) -> None:
        text = (place / "card.yaml").read_text().replace(str(place), "HERE")
        assert old in text
        (place / "card.yaml").write_text(text.replace(old, new).replace("HERE", str(place)))

    return change


def write(path: str, text: str):
    return lambda place: (place / "pipe" / path).write_text(text)


def pickled(part: str, name: str = "diffusion_pytorch_model.bin"):
    """Weights as a pickle that would tell if it is read."""

    class Evil:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return open, (self.path, "w")

    def change(place: Path) -> None:
        for file in (place / "pipe" / part).glob("*.safetensors"):
            file.unlink()
        torch.save({"weight": Evil(str(place / "RAN"))}, place / "pipe" / part / name)

    return change


def torn(part: str):
    def change(place: Path) -> None:
        file = next((place / "pipe" / part).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:1000])

    return change


def kl(channels: int):
    def change(place: Path) -> None:
        torch.manual_seed(5)
        tiny_nets.kl(channels).save_pretrained(place / "pipe" / "vae")

    return change


TEACHERS = {
    "no such folder": (card("/pipe", "/nowhere"), "no such folder, and no hub id (owner/name)"),
    "a card of converted weights without weights": (
        card("kind: diffusers", "kind: converted"),
        "fetch its pickle and run `flowmap import",
    ),
    "a card without a shape": (
        card("shape: [4, 8, 8]", ""),
        "card.yaml: shape: [] is not the shape of what the model denoises",
    ),
    "an unknown prediction": (
        edit(SCHEDULER, prediction_type="score"),
        "prediction_type 'score' is not one of epsilon, sample",
    ),
    "an unknown scheduler": (edit(SCHEDULER, _class_name="NoSuchScheduler"), "diffusers has no 'NoSuchScheduler'"),
    "an unknown scheduler in the index": (
        edit(INDEX, scheduler=["diffusers", "NoSuchScheduler"]),
        "diffusers has no 'NoSuchScheduler'",
    ),
    "no scheduler at all": (edit(INDEX, scheduler=["diffusers", "AutoencoderKL"]), "diffusers has no 'AutoencoderKL'"),
    "a scheduler of another kind": (
        edit(INDEX, scheduler=["diffusers", "ScoreSdeVeScheduler"]),
        "its clock is not known",
    ),
    "an unknown table": (edit(SCHEDULER, beta_schedule="nosuch"), "nosuch is not implemented"),
    "a table of words": (edit(SCHEDULER, beta_start="x"), "its settings do not make one"),
    "a prediction of noise where no signal is left": (
        edit(SCHEDULER, rescale_betas_zero_snr=True),
        "rescale_betas_zero_snr: true cannot go with",
    ),
    "a network that is already distilled": (
        edit(INDEX, scheduler=["diffusers", "LCMScheduler"]),
        "scheduler LCMScheduler: cannot be a teacher's",
    ),
    "a network of more channels": (
        edit("unet/config.json", in_channels=9),
        "in_channels: 9: it denoises 9 channels, the card's shape says 4",
    ),
    "a setting of the pipeline's": (edit(INDEX, boundary_ratio=0.9), "boundary_ratio: 0.9 is not known"),
    "a huge table": (edit(SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps: 1000000000 is more than"),
    "an empty table": (edit(SCHEDULER, num_train_timesteps=0), "alphas_cumprod must be a table"),
    "a scheduler that is no JSON": (write(SCHEDULER, "{"), "is not a valid JSON file"),
    "an index that is no JSON": (write(INDEX, "{"), "is not a valid JSON file"),
    "an index of another form": (write(INDEX, "[]"), "names no transformer or unet"),
    "an unknown network": (edit(INDEX, unet=["diffusers", "NoNet"]), "no call is known for NoNet"),
    "a network of its own code": (
        edit(INDEX, unet=["evil", "UNet2DConditionModel"]),
        "of 'evil' is no class of diffusers; its own code is not run",
    ),
    "a scheduler of its own code": (
        edit(INDEX, scheduler=["evil", "DDIMScheduler"]),
        "of 'evil' is no class of diffusers",
    ),
    "pickles alone": (
        pickled("unet"),
        "there is no *.safetensors; diffusion_pytorch_model.bin is a pickle and is not read",
    ),
    "latents of other channels": (kl(8), "its latents have 8 channels, those wanted 4"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_cannot_be_used_is_found_before_pictures_are_encoded(place, command, name):
    change, says = TEACHERS[name]
    change(place)
    refused(place, fit(place, command), says)
    assert not (place / "latents").exists()
    code, out, err = fit(place, command, "--dry-run")
    assert says in out + err and "nothing is missing" not in out
    assert (code, "missing on this machine" in out) in ((2, False), (3, True))


@pytest.mark.parametrize(
    ("lines", "says"), [("", "nobody/nothing: "), ("revision: nosuch\n", "nobody/nothing at revision nosuch: ")]
)
def test_a_pipeline_of_the_hub_that_is_not_here_offline(place, command, lines, says):
    card("HERE/pipe", "nobody/nothing")(place)
    (place / "card.yaml").write_text((place / "card.yaml").read_text() + lines)
    refused(place, fit(place, command), f"{says}no diffusers pipeline is there")
    code, out, _ = fit(place, command, "--dry-run")
    assert code == 3 and "nobody/nothing: not on this machine" in out


def test_a_revision_that_is_not_there(place, command, monkeypatch):
    """In a cache of the hub's that holds one revision of the pipeline, main: that one will do, another does not."""
    import huggingface_hub.constants

    cache, commit = place / "cache", "0" * 40
    held = cache / "models--owner--words"
    shutil.copytree(place / "pipe", held / "snapshots" / commit)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text(commit)
    for module in (huggingface_hub.constants, diffusers.configuration_utils, diffusers.models.modeling_utils):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache), raising=False)
    card("HERE/pipe", "owner/words")(place)
    good = (place / "card.yaml").read_text()
    assert encode(place, command)[0] == 0
    code, out, err = fit(place, command, "--dry-run")
    assert code == 0 and "nothing is missing" in out, out + err
    (place / "card.yaml").write_text(good + "revision: nosuch\n")
    refused(place, fit(place, command), "owner/words at revision nosuch: no diffusers pipeline is there")


def variant(part: str, stem: str):
    """Weights in half precision alone, as some hubs' folders have them."""
    return lambda place: (place / "pipe" / part / f"{stem}.safetensors").rename(
        place / "pipe" / part / f"{stem}.fp16.safetensors"
    )


def without_a_shard(part: str, stem: str):
    """Weights in two files, as their index says, the second of which did not arrive."""

    def change(place: Path) -> None:
        folder = place / "pipe" / part
        first, second = (f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2))
        (folder / f"{stem}.safetensors").rename(folder / first)
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"a": first, "b": second}})
        )

    return change


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FILES = {"of another variant": variant, "without a shard": without_a_shard, "torn": lambda part, stem: torn(part)}


@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize("kind", FILES)
def test_weight_files_that_are_not_all_there_are_named_before_anything_is_encoded(place, command, part, kind):
    stem = STEMS[part]
    FILES[kind](part, stem)(place)
    says = {
        "of another variant": (
            f"{stem}.fp16.safetensors is of the variant 'fp16', which is not read: save it as {stem}.safetensors too"
        ),
        "without a shard": f"{stem}-00002-of-00002.safetensors is missing",
        "torn": f"{stem}.safetensors: is not a whole safetensors file",
    }[kind]
    refused(place, fit(place, command), says)
    code, out, err = fit(place, command, "--dry-run")
    assert code == 2 and says in err.splitlines()[-1], out + err
    if part != "unet":
        refused(place, encode(place, command), says)
    assert not (place / "latents").exists()


def text_encoder(width: int):
    def change(place: Path) -> None:
        config = transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=2, bos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        shutil.rmtree(place / "pipe" / "text_encoder")
        transformers.CLIPTextModel(config).save_pretrained(place / "pipe" / "text_encoder")

    return change


ENCODERS = {
    "an autoencoder that is not there": (
        lambda place: shutil.rmtree(place / "pipe/vae"),
        "is no diffusers autoencoder",
    ),
    "an unknown autoencoder": (edit(VAE, _class_name="AutoencoderNoSuch"), "has no attribute AutoencoderNoSuch"),
    "an autoencoder's settings that are none": (edit(VAE, block_out_channels="x"), "autoencoder.source: "),
    "an autoencoder's settings of other weights": (edit(VAE, block_out_channels=[8, 24]), "autoencoder.source: "),
    "an autoencoder's settings that are no JSON": (write(VAE, "{"), "config.json: is not JSON"),
    "an autoencoder of pickles": (pickled("vae"), "diffusion_pytorch_model.bin is a pickle and is not read"),
    "torn weights of an autoencoder": (torn("vae"), "cannot be loaded"),
    "a text encoder of pickles": (
        pickled("text_encoder", "pytorch_model.bin"),
        "pytorch_model.bin is a pickle and is not read",
    ),
    "torn weights of a text encoder": (torn("text_encoder"), "is not a whole safetensors file"),
    "a text encoder of its own code": (
        edit(INDEX, text_encoder=["evil", "CLIPTextModel"]),
        "of 'evil' is no class of transformers",
    ),
    "a tokenizer of its own code": (
        edit(INDEX, tokenizer=["evil", "CLIPTokenizer"]),
        "of 'evil' is no class of transformers",
    ),
    "a text encoder of another module": (
        edit(INDEX, text_encoder=["antigravity", "X"]),
        "of 'antigravity' is no class of transformers",
    ),
    "a pipeline of its own code": (
        edit(INDEX, _class_name=["pipeline", "MyPipeline"]),
        "no call is known for ['pipeline', 'MyPipeline']",
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith("an autoencoder's") else name for name in ENCODERS],
)
def test_an_encoder_that_cannot_be_used_leaves_no_encoding_begun(place, command, name):
    change, says = ENCODERS[name]
    change(place)
    for result in (encode(place, command), fit(place, command)):
        refused(place, result, says)
        assert not (place / "latents").exists()


@pytest.mark.parametrize(
    ("change", "override", "says"),
    [
        (text_encoder(48), "log.every_steps=1", "its 'text' is 48 wide, UNet2DConditionModel reads 32"),
        (lambda place: None, "data.text=null", "classifier_free has no effect: the data has neither classes nor text"),
    ],
)
def test_text_that_the_network_cannot_read(place, command, change, override, says):
    change(place)
    refused(place, fit(place, command, override), says)
    if override != "data.text=null":  # that is known before anything is encoded
        assert (place / "latents" / "index.json").is_file(), "a whole encoding, of use to another teacher"
    code, _, err = fit(place, command, "--dry-run", override)
    assert code == 2 and says in err


def test_another_autoencoder_than_the_encoding_was_made_with(place, command):
    assert encode(place, command)[0] == 0
    before = bytes_of(place / "latents")
    kl(4)(place)
    for result in (encode(place, command), fit(place, command)):
        refused(place, result, "autoencoder.weights: '")
        assert bytes_of(place / "latents") == before
    code, out, _ = fit(place, command, "--dry-run")
    assert code == 3 and "holds another encoding: autoencoder.weights" in out


def test_pictures_that_are_broken_grey_or_huge_and_captions_that_are_missing(place, command, monkeypatch):
    from flowmap.data.images import folder as data_folder

    monkeypatch.setattr(data_folder, "MAX_PIXELS", 600)
    pictures = place / "pictures"
    (pictures / "broken.png").write_bytes((pictures / "00.png").read_bytes()[:60])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "words.webp").write_text("these are no pixels")
    (pictures / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    PIL.new("RGB", (200, 200)).save(pictures / "huge.png")
    PIL.new("L", (20, 20), 99).save(pictures / "grey.png")
    (pictures / "03.txt").unlink()
    (pictures / "04.txt").write_bytes(b"\xff\xfe\xfa")
    code, out, err = encode(place, command)
    assert code == 0, err
    assert "12 samples of shape (4, 8, 8), 6 pictures left out, 1 grey, 2 without a caption" in out
    left_out = dict(json.loads((place / "latents" / "index.json").read_text())["left_out"])
    assert set(left_out) == {"04.png", "broken.png", "code.png", "empty.jpg", "huge.png", "words.webp"}
    assert left_out["huge.png"] == "has 200 x 200 pixels" and left_out["04.png"].startswith(
        "its caption cannot be read"
    )
    assert all("\n" not in reason for reason in left_out.values())


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_without_a_picture_that_can_be_used(place, command, empty):
    for path in (place / "pictures").iterdir():
        path.unlink() if empty else path.write_bytes(b"no picture")
    refused(place, encode(place, command), "leaves nothing of 0 usable pictures")
    shutil.rmtree(place / "pictures")
    refused(place, encode(place, command), "there is no such folder")


def test_captions_of_another_form(place, command):
    (place / "pictures" / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a cat"}\nno JSON\n')
    refused(place, encode(place, command), "metadata.jsonl: line 2 is not")


def student_in(place: Path) -> Path:
    """An untrained student of the recipe, as a run leaves it."""
    from flowmap.build.data import build_data
    from flowmap.build.student import build_student, student_config
    from flowmap.build.teacher import build_teacher
    from flowmap.plan.plan import resolve
    from flowmap.student.folder import save_student

    recipe = flowmap.read_recipe(place / "recipe.yaml")
    run = resolve(recipe)
    data = build_data(run)
    teacher = build_teacher(run, data)
    config = student_config(run, data, teacher)
    weights = build_student(run, config, teacher).state_dict()
    save_student(place / "student", config, weights, recipe=recipe.to_yaml(), card="")
    return place / "student"


def test_prompts_and_decoders_that_do_not_fit_a_student(place, command, finished):
    assert encode(place, command)[0] == 0
    draw = ("--steps", 1, "--num", 2, "--out", place / "drawn", "--student")
    student = student_in(place)
    for result, says in (
        (command("sample", *draw, student), "prompt: is required: this student is conditioned on text"),
        (
            command("sample", *draw, student, "--prompt", "a cat", "--class", 3),
            "'class' is no condition of this student",
        ),
        (command("sample", *draw, finished, "--prompt", "a cat"), "--prompt: this student is not conditioned on text"),
    ):
        refused(place, result, says)
        assert not (place / "drawn").exists()
    assert command("sample", *draw, student, "--prompt", "a cat")[0] == 0
    shutil.rmtree(place / "drawn")
    kl(8)(place)
    refused(
        place, command("sample", *draw, student, "--prompt", "a cat"), "its latents have 8 channels, those wanted 4"
    )
    assert not (place / "drawn").exists()


def test_a_sentence_encoder_of_its_own_code_is_not_run(place, command):
    folder = place / "sentence"
    tiny_pipelines.clip().save_pretrained(folder)
    tiny_pipelines.tokenizer().save_pretrained(folder)
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.X", "AutoModel": "evil.X"}}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    (folder / "evil.py").write_text(f"open({str(place / 'RAN')!r}, 'w')\n")
    override = f"data.text={{kind: sentence, source: {folder}}}"
    refused(place, command("encode", "--recipe", place / "recipe.yaml", override), "no transformers encoder")
    assert not (place / "latents").exists()

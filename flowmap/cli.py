"""The command line, a function for each verb. Exit 0 on success, 2 with one line on a user's mistake, 3 when a dry run finds that
something named is missing on this machine, 1 on a failure."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flowmap import __version__
from flowmap.base.distributed import is_child
from flowmap.base.trust import allow_import
from flowmap.papers import PAPERS
from flowmap.sample_verb import sample_arguments, sample_verb
from flowmap.terminal import plain_warnings, summary
from flowmap.train.compare_verb import compare_arguments, compare_verb

PATH_MISTAKES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        for name in getattr(arguments, "imports", None) or []:
            allow_import(name)
        with plain_warnings():
            return arguments.run(arguments)
    except ValueError as error:  # RecipeError among them: a user's mistake
        return _say_error(error, 2)
    except KeyboardInterrupt as error:
        return _say_error(str(error) or "interrupted", 1)
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        sys.stderr.close()
        return 0
    except OSError as error:
        return _say_error(error, 2 if error.errno in PATH_MISTAKES else 1)
    except (RuntimeError, ImportError) as error:
        return _say_error(error, 1)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; key=value and +FILE may stand on both sides of an option, which argparse alone does not allow."""
    parser, words = _parser(), list(sys.argv[1:] if argv is None else argv)
    # compare's --recipes and --steps would take all that follows
    behind = [i for i, word in enumerate(words) if words[0] == "compare" and _is_setting(word) and words[i - 1] not in ("--out", "--import")]
    arguments, rest = parser.parse_known_args([word for i, word in enumerate(words) if i not in behind])
    odd = [word for word in rest if not _is_setting(word) or not hasattr(arguments, "overrides")]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if settings := [*(words[i] for i in behind), *rest]:
        arguments.overrides = [*arguments.overrides, *settings]
    return arguments


def _is_setting(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("+"))


def _say_error(error: object, code: int) -> int:
    if is_child():  # the first process says it
        return code
    print(f"flowmap: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _fit(a: argparse.Namespace) -> int:
    from flowmap.recipe import read_recipe

    recipe = read_recipe(a.recipe, a.overrides)
    if a.dry_run:
        from flowmap.planning.dry_run import MISSING, dry_run

        lines = dry_run(recipe, a.out, throughput=a.throughput)
        print("\n".join(lines))
        return 3 if lines[-1].startswith(MISSING) else 0
    from flowmap.train.fit import fit

    run = fit(recipe, a.out, resume=a.resume, overwrite=a.overwrite)
    if run.metrics:
        print(summary(run.metrics))
        print(f"student: {run.folder / 'student'}")
    return 0


def _sample(a: argparse.Namespace) -> int:
    return sample_verb(a, _device(a.device))


def _evaluate(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.evaluate import evaluate
    from flowmap.student.folder import load_student

    say = lambda message: print(message, file=sys.stderr, flush=True)
    if a.out is not None:
        check_writable(Path(a.out).parent, "--out")
        _check_figures(Path(a.out))
    student = load_student(a.student, base=a.base).to(_device(a.device))
    metrics = evaluate(
        student, a.steps, metrics=a.metrics, guidance=a.guidance, out=a.out, progress=say, teacher=a.teacher, anew=a.anew
    )  # fmt: skip
    print(summary(metrics) if a.out else json.dumps(metrics, indent=2))
    return 0


def _check_figures(path: Path) -> None:
    """ValueError where that file is there and holds no figures of a student."""
    try:
        if path.exists() and "student" not in json.loads(path.read_text(encoding="utf-8")):
            raise ValueError
    except (ValueError, TypeError, OSError):
        raise ValueError(f"--out: {path} is there and holds no figures of a student; choose another file") from None


def _doctor(a: argparse.Namespace) -> int:
    from flowmap.recipe import read_recipe
    from flowmap.train.doctor import examine

    print("\n".join(examine(read_recipe(a.recipe, a.overrides), batch=a.batch, device=_device(a.device))))
    return 0


def _encode(a: argparse.Namespace) -> int:
    from flowmap.shards.verbs import encode_verb

    return encode_verb(a, _device(a.device))


def _pairs(a: argparse.Namespace) -> int:
    from flowmap.shards.verbs import pairs_verb

    return pairs_verb(a, _device(a.device))


def _average(a: argparse.Namespace) -> int:
    from flowmap.train.average_verb import average_verb

    return average_verb(a)


def _import_weights(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.importing.weights import import_weights

    check_writable(Path(a.out), "--out")
    if len(a.files) == 1 and a.std is None and Path(a.files[0]).is_dir():
        from flowmap.importing.pipeline import convert_pipeline

        print(f"{a.out}: weights of {', '.join(convert_pipeline(a.files[0], a.out))} as safetensors")
        return 0
    config = import_weights(a.files, a.out, std=a.std)
    print(f"{a.out}: samples of shape {tuple(config.shape)}, {config.num_classes or 'no'} classes")
    return 0


def _merge(a: argparse.Namespace) -> int:
    from flowmap.student.merge import merge_verb

    return merge_verb(a)


def _export(a: argparse.Namespace) -> int:
    from flowmap.export import export
    from flowmap.export.hub import check_repository, push
    from flowmap.student.folder import load_student

    if a.push is not None:
        check_repository(a.push)
    options = dict(to=a.to, steps=a.steps, guidance=a.guidance, custom=a.custom, text=not a.no_text, overwrite=a.overwrite)
    print(export(load_student(a.student, base=a.base), a.out, **options))
    if a.push is not None:
        print(push(Path(a.out), a.push))
    return 0


def _device(name: str):
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # not a device, or none of that kind on this machine
        raise ValueError(f"--device: {name!r} cannot be used here (cpu always can): {str(error).splitlines()[0]}") from error


def _show(a: argparse.Namespace) -> int:
    from flowmap.recipe import read_recipe

    print(read_recipe(a.recipe, a.overrides).to_yaml(), end="")
    return 0


def _list(a: argparse.Namespace) -> int:
    from flowmap.list_verb import list_verb

    return list_verb(a)


def _cite(a: argparse.Namespace) -> int:
    for key, (title, here, authors, year, arxiv) in PAPERS.items():
        authors = authors.replace("et al.", "others").replace(", ", " and ")  # BibTeX's words
        if here:
            print(f"% {here}")
        print(f"@article{{{key},\n  title  = {{{title}}},\n  author = {{{authors}}},\n  year   = {{{year}}},\n  note   = {{arXiv:{arxiv}}},\n}}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowmap", description="Distil a slow diffusion or flow teacher into a student of 1, 2 or 4 steps.")
    parser.add_argument("--version", action="version", version=f"flowmap {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    fit = _verb(verbs, "fit", _fit, "train a recipe, and first whatever it needs")
    _recipe_arguments(fit)
    fit.add_argument("--out", help="run folder (default: runs/<recipe name>)")
    what = "; a trained run is measured again with other metrics, sampler, evaluation or log"
    fit.add_argument("--resume", action="store_true", help=f"go on from the folder's last checkpoint{what}")
    fit.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds, once the new one has a checkpoint")
    fit.add_argument("--dry-run", action="store_true", help="print the plan, parameters, FLOPs, memory, GPU-hours and what is missing; train nothing")
    fit.add_argument("--throughput", type=float, default=200.0, metavar="T", help="TFLOP/s of one device, for the dry run's hours (default: 200)")

    sample = _verb(verbs, "sample", _sample, "draw samples as pictures or sentences")
    _student_arguments(sample)
    sample_arguments(sample)

    evaluate = _verb(verbs, "evaluate", _evaluate, "measure a student by its recipe's metrics")
    _student_arguments(evaluate)
    evaluate.add_argument("--steps", type=int, nargs="+", metavar="K", help="default: the recipe's")
    evaluate.add_argument("--metrics", nargs="+", metavar="KIND", help="only these kinds")
    evaluate.add_argument("--out", help="write the figures to this JSON file")
    evaluate.add_argument("--no-teacher", dest="teacher", action="store_false", help="leave the teacher's rows out")
    evaluate.add_argument("--anew", action="store_true", help="measure the teacher and the floor again, not as they are in the run's metrics.json")

    compare = _verb(verbs, "compare", compare_verb, "train recipes on equal terms, seed by seed, and tabulate them; goes on where it was cut")
    compare_arguments(compare)
    _import_argument(compare)

    encode = _verb(verbs, "encode", _encode, "turn a recipe's pictures into latents and text embeddings on disk; goes on where it was cut")
    _recipe_arguments(encode)
    _shard_arguments(encode, batch=32, out="the recipe's data.root")
    encode.add_argument("--verify", action="store_true", help="read every file of the finished encoding and compare its checksum; encodes nothing")

    pairs = _verb(verbs, "pairs", _pairs, "join noise to data by a teacher's ODE, for recipes with coupling pairs; goes on where it was cut")
    _recipe_arguments(pairs)
    _shard_arguments(pairs, batch=256, out="the recipe's coupling.root")
    pairs.add_argument("--verify", type=int, metavar="N", help="check all checksums, make N of the pairs again and report the largest difference")

    doctor = _verb(verbs, "doctor", _doctor, "try one training step of a recipe on its real network: which derivative works, what it costs")
    _recipe_arguments(doctor)
    doctor.add_argument("--batch", type=int, default=2, help="samples in the step")
    doctor.add_argument("--device", default="cpu")

    average = _verb(verbs, "average", _average, "combine a run's snapshots to an average (EMA) of another width, as a student")
    average.add_argument("--run", dest="run_folder", required=True, metavar="DIR", help="a run folder that kept snapshots (ema.snapshot_every_steps)")
    average.add_argument("--std", type=float, required=True, help="relative width of the average, as EDM2 gives it: 0.05, 0.10, ...")
    average.add_argument("--step", type=int, metavar="N", help="as of that step (default: the last)")
    average.add_argument("--out", required=True, help="folder for the student")
    _import_argument(average)

    weights = _verb(verbs, "import", _import_weights, "convert published pickles to safetensors, executing nothing in them")
    what = "one EDM or EDM2 network, several snapshots of one run, or a diffusers pipeline's folder"
    weights.add_argument("--from", dest="files", nargs="+", required=True, metavar="FILE.pkl|DIR", help=what)
    weights.add_argument("--std", type=float, help="width of the average over several snapshots named ...-NUMBER-STD.pkl")
    weights.add_argument("--out", required=True, help="folder, for a card weights/CARD")

    merge = _verb(verbs, "merge", _merge, "add a finetune's difference from its base, or a LoRA, onto a student's weights, without training")
    _student_argument(merge)
    merge.add_argument("--delta", metavar="DIR|FILE", help="the finetune: a diffusers folder, a student folder or a safetensors file")
    merge.add_argument("--base", metavar="DIR|FILE", help="what it was trained from")
    merge.add_argument("--alpha", type=float, default=1.0, metavar="A", help="how much of the difference")
    merge.add_argument("--lora", metavar="FILE", help="a LoRA in the format of diffusers or peft, safetensors")
    merge.add_argument("--scale", type=float, default=1.0, metavar="S", help="how much of the LoRA")
    merge.add_argument("--strict", action="store_true", help="refuse what does not fit whole")
    merge.add_argument("--overwrite", action="store_true", help="replace the merge that the folder holds")
    merge.add_argument("--out", required=True, help="folder for the student")

    export = _verb(verbs, "export", _export, "write a student as a diffusers pipeline or LoRA or a torch program, for those without flowmap")
    _student_argument(export, base=True)
    export.add_argument("--to", choices=["diffusers", "torch", "lora"], default="diffusers")
    export.add_argument("--steps", type=int, metavar="K", help="steps that it is made for (default: the sampler's largest)")
    export.add_argument("--guidance", type=float, metavar="W", help="guidance scale that it is made for (default: the recipe's)")
    export.add_argument("--custom", action="store_true", help="a pipeline with its own code, also where diffusers has a stock one")
    export.add_argument("--no-text", action="store_true", help="leave the student's text encoders out of the folder")
    export.add_argument("--overwrite", action="store_true", help="replace the export that the folder holds")
    export.add_argument("--push", metavar="OWNER/NAME", help="then upload the folder to that repository of the hub")
    export.add_argument("--out", required=True, help="folder for the export")

    _recipe_arguments(_verb(verbs, "show", _show, "print a recipe with every default"))
    _import_argument(_verb(verbs, "list", _list, "list recipes, teachers and kinds"))
    _verb(verbs, "cite", _cite, "print the papers behind the methods, as BibTeX")
    return parser


def _verb(verbs, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, metavar="NAME|PATH", help="a shipped recipe (see `flowmap list`) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value|+FILE", help="settings that replace the recipe's; +FILE: those of a YAML file")
    _import_argument(parser)


def _shard_arguments(parser: argparse.ArgumentParser, *, batch: int, out: str) -> None:
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="make part I of N (from 0), beside other processes that make the others")
    parser.add_argument("--batch", type=int, default=batch, help="samples that the networks see at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help=f"folder (default: {out})")


def _import_argument(parser: argparse.ArgumentParser) -> None:
    what = "run this Python of yours first: it adds kinds, and a recipe may name its attributes"
    parser.add_argument("--import", dest="imports", action="append", metavar="FILE|MODULE", help=what)


def _student_arguments(parser: argparse.ArgumentParser) -> None:
    _student_argument(parser, base=True)
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the recipe's)")
    parser.add_argument("--device", default="cpu")


def _student_argument(parser: argparse.ArgumentParser, base: bool = False) -> None:
    parser.add_argument("--student", required=True, metavar="DIR|HUB-ID", help="a student folder, its run folder, or a hub id")
    _import_argument(parser)
    if base:
        parser.add_argument("--base", metavar="DIR|HUB-ID", help="where a LoRA student's base is now, if it has moved")


if __name__ == "__main__":
    sys.exit(main())

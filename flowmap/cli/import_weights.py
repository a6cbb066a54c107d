"""`flowmap import`: converts published pickles to safetensors, executing nothing in them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "one EDM or EDM2 network, several snapshots of one run, or a diffusers pipeline's folder"
    parser.add_argument("--from", dest="files", nargs="+", required=True, metavar="FILE.pkl|DIR", help=what)
    parser.add_argument(
        "--std",
        type=float,
        help="width of the average over several snapshots named ...-NUMBER-STD.pkl",
    )
    parser.add_argument("--out", required=True, help="folder, for a card weights/CARD")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.convert.weights import import_weights

    check_writable(Path(a.out), "--out")
    if len(a.files) == 1 and a.std is None and Path(a.files[0]).is_dir():
        from flowmap.convert.pipeline import convert_pipeline

        print(f"{a.out}: weights of {', '.join(convert_pipeline(a.files[0], a.out))} as safetensors")
        return 0
    config = import_weights(a.files, a.out, std=a.std)
    print(f"{a.out}: samples of shape {tuple(config.shape)}, {config.num_classes or 'no'} classes")
    return 0

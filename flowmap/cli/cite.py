"""`flowmap cite`: prints the papers behind the methods, as BibTeX."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None: ...


def run(a: argparse.Namespace) -> int:
    from flowmap.recipe.papers import PAPERS

    for key, (title, here, authors, year, arxiv) in PAPERS.items():
        authors = authors.replace("et al.", "others").replace(", ", " and ")  # BibTeX's words
        if here:
            print(f"% {here}")
        print(f"@article{{{key},\n  title  = {{{title}}},\n  author = {{{authors}}},")
        print(f"  year   = {{{year}}},\n  note   = {{arXiv:{arxiv}}},\n}}")
    return 0

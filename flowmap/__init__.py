"""flowmap: a slow diffusion or flow teacher becomes a student that samples in 1, 2 or 4 steps.

run = flowmap.fit(flowmap.read_recipe("digits"))
student = flowmap.load_student("runs/digits/student")
images = student.sample(16, steps=2, cond={"class": 3}, guidance=2.0, seed=0)   # (16, C, H, W) in [-1, 1]
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "load_student",
    "read_recipe",
    "fit",
    "wrap",
    "as_data",
    "module",
    "sample",
    "evaluate",
    "allow_import",
    "__version__",
]

_HOME = {
    "load_student": "flowmap.student.folder",
    "read_recipe": "flowmap.recipe",
    "fit": "flowmap.train.fit",
    "wrap": "flowmap.build.given",
    "as_data": "flowmap.data.given",
    "module": "flowmap.nets.module_builders",
    "sample": "flowmap.evaluation.samples",
    "evaluate": "flowmap.evaluation.measure",
    "allow_import": "flowmap.base.trust",
}


def __getattr__(name: str):
    """Public names, imported when they are first used: `import flowmap` alone stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'flowmap' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

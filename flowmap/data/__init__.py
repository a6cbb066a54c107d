"""What a recipe's `data` slot may name: DATA maps a kind to a frozen spec whose `build()` gives a Dataset in memory.

Nothing heavy is imported before `build()`, so that reading a recipe stays quick.
"""

from flowmap.data.dataset import Dataset, as_it_is
from flowmap.data.folder import Folder
from flowmap.data.images import Digits, Fashion
from flowmap.data.steps import StepBatches
from flowmap.data.tensors import Latents, Pictures
from flowmap.data.toy import Toy

DATA = {"digits": Digits, "fashion": Fashion, "folder": Folder, "toy": Toy, "latents": Latents, "pictures": Pictures}

__all__ = ["DATA", "Dataset", "Digits", "Fashion", "Folder", "Latents", "Pictures", "StepBatches", "Toy", "as_it_is"]

"""The kinds of data, picture sources and couplings that a recipe may name: DATA, IMAGE_SOURCES and COUPLINGS.

DATA maps a kind to a frozen dataclass; its `build()` returns a data set. Heavy packages are imported by `build()` only,
so that recipes are read quickly.
"""

from flowmap.base import torchvision_shim
from flowmap.data.codes import Codes
from flowmap.data.dataset import Dataset, as_it_is
from flowmap.data.encoded import Autoencoder, Encoded, TextEncoder
from flowmap.data.given import Given
from flowmap.data.images.builtin import Digits, Fashion
from flowmap.data.images.edm2_zip import EDM2Images, EDM2Latents
from flowmap.data.images.folder import Folder, FolderImages
from flowmap.data.images.huggingface import HuggingFaceImages
from flowmap.data.images.webdataset import WebDatasetImages
from flowmap.data.pairs import COUPLINGS, Coupling, Guidance, Independent, PairedDataset, Pairs, TeacherSlot
from flowmap.data.sources import ImageSource
from flowmap.data.steps import StepBatches, first_place
from flowmap.data.teacher_samples import TeacherSamples
from flowmap.data.tensors import Latents, Pictures
from flowmap.data.text.dataset import Text, TextDataset
from flowmap.data.text.latents import TextCoder
from flowmap.data.text.sources import TEXT_SOURCES, TextSource
from flowmap.data.text.styles import StyledDataset, Styles
from flowmap.data.text.tokens import TOKENIZERS, Tokenizer
from flowmap.data.toy import Toy

torchvision_shim.install()  # libraries that this room imports import torchvision

DATA = {
    "digits": Digits,
    "fashion": Fashion,
    "folder": Folder,
    "toy": Toy,
    "latents": Latents,
    "pictures": Pictures,
    "encoded": Encoded,
    "edm2_zip": EDM2Latents,
    "text": Text,
    "codes": Codes,
    "given": Given,
    "teacher_samples": TeacherSamples,
}
COUPLINGS["styles"] = Styles
IMAGE_SOURCES = {
    "folder": FolderImages,
    "huggingface": HuggingFaceImages,
    "edm2_zip": EDM2Images,
    "webdataset": WebDatasetImages,
}

__all__ = [
    "COUPLINGS",
    "DATA",
    "IMAGE_SOURCES",
    "TEXT_SOURCES",
    "TOKENIZERS",
    "Autoencoder",
    "Coupling",
    "Dataset",
    "Digits",
    "Encoded",
    "Fashion",
    "Folder",
    "Given",
    "Guidance",
    "ImageSource",
    "Independent",
    "Latents",
    "PairedDataset",
    "Pairs",
    "Pictures",
    "StepBatches",
    "first_place",
    "StyledDataset",
    "Styles",
    "TeacherSamples",
    "TeacherSlot",
    "Text",
    "TextCoder",
    "TextDataset",
    "TextEncoder",
    "TextSource",
    "Tokenizer",
    "Toy",
    "as_it_is",
]

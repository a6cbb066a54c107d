"""Floor 1: what a student is trained to satisfy. One file a paper; a new objective is a frozen dataclass and a line here."""

from flowmap.objectives.ayf import AYFEMD, AYFLMD
from flowmap.objectives.flow_matching import FlowMatching
from flowmap.objectives.reconstruction import Reconstruction

OBJECTIVES = {"flow_matching": FlowMatching, "ayf_emd": AYFEMD, "ayf_lmd": AYFLMD, "reconstruction": Reconstruction}

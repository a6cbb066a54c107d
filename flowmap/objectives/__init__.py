"""Objectives: what a student is trained to satisfy. Each is a frozen dataclass in a file of its own and an entry of
OBJECTIVES.
"""

from flowmap.base import torchvision_shim
from flowmap.objectives.adversarial import Adversarial
from flowmap.objectives.alpha_flow import AlphaFlow
from flowmap.objectives.ayf import AYFEMD, AYFLMD, AYFMixed
from flowmap.objectives.cmt import CMT
from flowmap.objectives.consistency import Consistency
from flowmap.objectives.facm import FACM
from flowmap.objectives.flow_matching import FlowMatching
from flowmap.objectives.freeflow import FreeFlow
from flowmap.objectives.instaflow import Endpoint
from flowmap.objectives.joint import Joint
from flowmap.objectives.language import TextELBO, TextJoint
from flowmap.objectives.lediflow import VarianceGuided
from flowmap.objectives.mean_velocity_match import MeanVelocityMatch
from flowmap.objectives.meanflow import MeanFlow
from flowmap.objectives.pi_flow import PiFlow
from flowmap.objectives.rcgm import RCGM
from flowmap.objectives.reconstruction import Reconstruction
from flowmap.objectives.rectified import Rectified
from flowmap.objectives.reverse_kl import ReverseKL
from flowmap.objectives.reward_tuning import RewardTuning
from flowmap.objectives.scm import SCM
from flowmap.objectives.score_distillation import ScoreDistillation
from flowmap.objectives.self_distilled import ESD, LSD, PSD
from flowmap.objectives.self_fake import SelfFake
from flowmap.objectives.shortcut import Shortcut
from flowmap.objectives.twin import Twin

torchvision_shim.install()  # libraries that this room imports import torchvision

OBJECTIVES = {
    "flow_matching": FlowMatching,
    "ayf_emd": AYFEMD,
    "ayf_lmd": AYFLMD,
    "ayf_mixed": AYFMixed,
    "meanflow": MeanFlow,
    "alpha_flow": AlphaFlow,
    "rcgm": RCGM,
    "pi_flow": PiFlow,
    "scm": SCM,
    "esd": ESD,
    "lsd": LSD,
    "psd": PSD,
    "shortcut": Shortcut,
    "freeflow": FreeFlow,
    "facm": FACM,
    "consistency": Consistency,
    "cmt": CMT,
    "score_distillation": ScoreDistillation,
    "rectified": Rectified,
    "adversarial": Adversarial,
    "reward_tuning": RewardTuning,
    "joint": Joint,
    "endpoint": Endpoint,
    "reconstruction": Reconstruction,
    "text_elbo": TextELBO,
    "text_joint": TextJoint,
    "variance_guided": VarianceGuided,
}

TERMS = {
    "reverse_kl": ReverseKL,
    "self_fake": SelfFake,
    "mean_velocity_match": MeanVelocityMatch,
    "twin": Twin,
}
"""The distribution-matching terms of objective joint."""

"""A student with random weights everywhere: zero-initialised layers would hide the others."""

from __future__ import annotations

import torch

from flowmap.student.config import StudentConfig
from flowmap.student.student import Student


def random_student(config: StudentConfig) -> Student:
    """The student of that configuration, ready to sample."""
    torch.manual_seed(0)
    flow_map = config.build().eval().requires_grad_(False)
    for p in flow_map.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Student(config, flow_map)

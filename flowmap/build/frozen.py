"""The precision in which a run holds frozen weights: those of the teacher's networks and of a LoRA student's base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowmap.base.schema import RecipeError
from flowmap.nets.edm2 import fold_filters
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import hold
from flowmap.nets.quantized import quantize
from flowmap.recipe import Recipe


def hold_frozen(
    recipe: Recipe, teachers: Sequence[FlowMapNet], student: FlowMapNet, averages: Sequence[FlowMapNet] = ()
) -> None:
    """Fold, quantise and round frozen weights, in place: the last two as the recipe says, to bfloat16.

    Call it when all that starts from them has been built. Raises RecipeError if nothing can be quantised.
    """
    for net in teachers:
        fold_filters(net)
    adapted = [student] if recipe.lora is not None else []
    if recipe.quantize.frozen is not None and (teachers or adapted):
        try:
            quantize([*teachers, *adapted], recipe.quantize.frozen, copies=averages if adapted else ())
        except ValueError as error:
            raise RecipeError(f"{recipe.name}: {error}") from error
    if recipe.trainer.frozen_precision != "bf16":
        return
    for net in (*teachers, *adapted):
        hold(net, torch.bfloat16)
    for net in averages if adapted else ():  # their base is the student's; adapters and averages are not rounded
        net.held = torch.bfloat16

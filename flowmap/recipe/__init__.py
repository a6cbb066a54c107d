"""Recipes: reading, composing, checking, and the registry of kinds."""

from flowmap.base.schema import RecipeError
from flowmap.recipe.composing import list_recipes
from flowmap.recipe.recipe import Recipe, read_recipe, read_resolved

__all__ = ["Recipe", "RecipeError", "list_recipes", "read_recipe", "read_resolved"]

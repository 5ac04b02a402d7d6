"""Training by recipe: YAML in, a run folder out, resumed exactly where it was interrupted."""

from path_attention.training.recipe import Recipe, load_recipe, recipe_from_mapping, shipped_recipes

__all__ = ["Recipe", "load_recipe", "recipe_from_mapping", "shipped_recipes"]

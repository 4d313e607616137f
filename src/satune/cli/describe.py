"""``satune describe``."""

from __future__ import annotations

from satune.cli.common import AsJson, Overrides, RecipeFile, shipped_recipe, show_result


def describe(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved recipe, and what each agent needs, before anything is loaded."""
    from satune.commands.describe import describe_recipe, show_description
    from satune.config.load import load_recipe

    loaded = load_recipe(shipped_recipe(recipe), overrides or [])
    show_result(describe_recipe(loaded), as_json, show_description)

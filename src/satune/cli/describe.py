"""``satune describe``."""

from __future__ import annotations

from satune.cli.common import (
    AsJson,
    Overrides,
    RecipeFile,
    TrustCode,
    shipped_recipe,
    show_result,
    trust_of,
)


def describe(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """The resolved recipe, and what each agent needs, before anything is loaded."""
    from satune.commands.describe import describe_recipe, show_description
    from satune.commands.trust import given_recipe

    spoken = trust_of(trust, overrides)
    loaded = given_recipe(shipped_recipe(recipe), overrides or [], spoken)
    show_result(describe_recipe(loaded), as_json, show_description)

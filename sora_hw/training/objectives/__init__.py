"""What a run learns: the next token, or the label of a sentence. One file for each, behind one interface."""

from sora_hw.recipes.recipe import Classification, Recipe
from sora_hw.training.objectives.classification import ClassifyingSentences
from sora_hw.training.objectives.language_modelling import PredictingTokens
from sora_hw.training.objectives.objective import Objective


def objective_of(recipe: Recipe) -> Objective:
    """What `recipe` learns."""
    return ClassifyingSentences(recipe) if isinstance(recipe, Classification) else PredictingTokens(recipe)

"""What a user asks of a compression, and what the sizes of the data make of it while it runs; `compress` explains each option."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from slimformer.errors import RecipeError
from slimformer.rules import Count, Points, Positive, Seed, mistakes_in, real_number
from slimformer.running.recipe import RIVALS, Recipe, Rivals

TRIES = 3  # at most so many budgets are trained
WAIT_SHARE = 0.05  # of a budget that may go into waiting for a quiet machine

Speedup = Annotated[float, real_number("above 1 and at most 100", lambda value: 1 < value <= 100, 1.0, 101.0)]
Minutes = Annotated[float, real_number("above 0", lambda value: value > 0, 0.0, 1e5)]
VocabularyChoice = Literal["whole", "trim"]
EngineChoice = Literal["onnx", "kernels"]  # the exporters whose files are searched for
CHANGEABLE = ("speedup", "max_loss", "tries")  # these may change when a run resumes: earlier results stay valid


@dataclass(frozen=True)
class Wanted:
    """The options of a compression; `compress` explains each of them."""

    speedup: Speedup = 3.0
    max_loss: Points = 1.0
    epochs: Positive | None = None
    lr: Positive | None = None
    batch_size: Count = 32
    seed: Seed = 17
    tries: Count = TRIES
    rivals: Rivals = RIVALS
    minutes: Minutes | None = None
    vocabulary: VocabularyChoice = "whole"
    engine: EngineChoice = "onnx"

    def __post_init__(self) -> None:
        for name in ("speedup", "max_loss", "epochs", "lr", "minutes"):  # 2 and 2.0 are the same purpose
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
        wrong = mistakes_in(self)
        if wrong:
            raise RecipeError("these options cannot be used.", facts=wrong, help="see `slimformer compress --help`.")

    def purpose(self, recipe: Recipe) -> str:
        """The purpose of a folder."""
        fixed = {name: value for name, value in asdict(self).items() if name not in CHANGEABLE}
        if self.vocabulary == "whole":
            del fixed["vocabulary"]  # as before there was a choice
        if self.engine == "onnx":
            del fixed["engine"]
        options = {"model": recipe.model, "task": repr(recipe.task), **fixed}
        return f"compress {json.dumps(options, sort_keys=True, default=str)}"

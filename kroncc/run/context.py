"""What the handlers of a run share: the plan, the store, the recipe's folder, models and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from kroncc.data.batching import Batches
from kroncc.data.splits import SplitData, open_data
from kroncc.data.tokens import tokenise
from kroncc.errors import RunError
from kroncc.graph.capture import capture
from kroncc.graph.model_graph import ModelGraph
from kroncc.model.load import LABELLED, load_dense, load_directory, skeleton
from kroncc.model.replay import replay, structure_of
from kroncc.model.source import Origin, resolve, tokenizer_for
from kroncc.plan.stages import ModelReport, Plan
from kroncc.recipe.names import BASE
from kroncc.recipe.schema import Recipe
from kroncc.recipe.written import as_written
from kroncc.rewrite.reshape import reshape, tree_part
from kroncc.run.files import files_in
from kroncc.run.progress import Reporter
from kroncc.run.store import RunStore

DEFAULT_TASK = "feature-extraction"


@dataclass
class Context:
    """One run: handlers read it and write nothing into it."""

    plan: Plan
    store: RunStore
    root: Path  # the folder of the recipe; its relative paths start here
    reporter: Reporter
    _data: dict[str, SplitData] = field(default_factory=dict)
    _graphs: dict[tuple[Any, ...], ModelGraph] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return Recipe.model_validate(self.plan.recipe)

    @cached_property
    def origin(self) -> Origin:
        """Where `base` comes from."""
        return resolve(self.recipe.model, self.root)

    @property
    def task(self) -> str:
        """The transformers task of every model of the run."""
        return self.recipe.model.task or DEFAULT_TASK

    def report(self, name: str) -> ModelReport:
        """What the plan says of a model."""
        return self.plan.models[name]

    def location(self, name: str) -> Path:
        """Return the directory of a model; `RunError` K825 if the step that makes it has not run."""
        if name == BASE:
            return self.origin.fetch()
        stage = next((stage for stage in self.plan.stages if stage.name == name), None)
        record = self.store.record(stage) if stage else None
        if record is None:
            raise RunError(
                f"the model {name!r} is not there", code="K825", remedy="run the same command again"
            )
        return Path(record.model) if record.model else self.store.step(name)

    def load(self, name: str, labels: int | None = None, seed: int = 0) -> PreTrainedModel:
        """Return a model with its weights, float32, in eval mode.

        With `labels` its head gets so many, anew from `seed` where it had another number.
        """
        if name != BASE:
            return load_directory(self.location(name), labels, seed)
        wanted = labels if labels is not None else self.report(BASE).labels
        return load_dense(self.origin, self.task, wanted, seed)

    def graph(self, model: PreTrainedModel, inputs: Sequence[str] | None = None) -> ModelGraph:
        """Return the graph of a model that `load` gave; captured once for each number of labels and shape."""
        labels = model.config.num_labels if type(model).__name__.endswith(LABELLED) else None
        shape = tree_part(structure_of(model))
        key = (labels, inputs and tuple(inputs), shape.model_dump_json())
        if key not in self._graphs:
            tree = skeleton(replace(self.origin, config=model.config), self.task, labels)
            replay(tree, shape)
            self._graphs[key] = capture(tree, inputs, partial(reshape, structure=shape))
        return self._graphs[key].bind(model)

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of a model."""
        return tokenizer_for(self.location(name))

    def data(self, name: str) -> SplitData:
        """Return a data set of the recipe; opened once a run."""
        if name not in self._data:
            cache = self.store.directory / "data"
            self._data[name] = open_data(self.recipe.data[name], name, self.root, cache)
        return self._data[name]

    def batches(
        self, data: str, split: str, model: PreTrainedModel, name: str, size: int, seed: int | None = None
    ) -> Batches:
        """Return the rows of a split in batches; shuffled by `seed`, in a fixed order without one."""
        tokenizer = self.tokenizer(name)
        tokens = tokenise(
            self.data(data)[split],
            tokenizer,
            self.recipe.data[data],
            self.store.directory / "data",
            task=self.task,
            positions=positions_of(model),
        )
        return Batches(tokens, tokenizer, self.task, size, seed=seed or 0, shuffle=seed is not None)

    def recipe_text(self) -> str:
        """Return the resolved recipe as YAML, in the form of a recipe file."""
        return yaml.safe_dump(as_written(self.recipe), sort_keys=False, allow_unicode=True)


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that a model takes, tokens; None where its config sets no bound.

    RoBERTa and its kin count positions from one after the padding's; the rows before are never used.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    if rows is None:
        return None
    tables = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    paddings = [getattr(table, "padding_idx", None) for table in tables]
    return int(rows) - max((padding + 1 for padding in paddings if padding is not None), default=0)


def weight_bytes(directory: Path) -> int:
    """Return the size of a model's weight files, bytes."""
    return sum(size for name, size in files_in(directory).items() if name.endswith(".safetensors"))

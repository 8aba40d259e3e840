"""What is cut together, found from the data flow alone: heads, neurons, streams; what is pinned, why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kroncc.graph.axes import Axes
from kroncc.graph.capture import capture
from kroncc.graph.units import features, heads, neurons, streams


def places(axes, units):
    return {
        f"{span.names[0]}.{span.dim}": (span.outer, span.size, span.inner) for span in axes.spans(units.atom)
    }


def test_heads_of_gpt2_lie_in_one_map_three_times(tiny):
    axes = Axes(capture(tiny("gpt2", n_layer=1)))
    (units,) = heads(axes)
    assert places(axes, units) == {
        "h.0.attn.c_attn.weight.1": (3, 4, 8),
        "h.0.attn.c_attn.bias.0": (3, 4, 8),
        "h.0.attn.c_proj.weight.0": (1, 4, 8),
    }


def test_heads_of_queries_follow_those_of_keys(tiny):
    axes = Axes(capture(tiny("llama", num_hidden_layers=1)))
    (units,) = heads(axes)
    prefix = "layers.0.self_attn."
    assert places(axes, units) == {
        f"{prefix}q_proj.weight.0": (1, 2, 16),
        f"{prefix}k_proj.weight.0": (1, 2, 8),
        f"{prefix}v_proj.weight.0": (1, 2, 8),
        f"{prefix}o_proj.weight.1": (1, 2, 16),
    }


def test_a_table_of_biases_joins_the_heads_of_all_layers(tiny):
    axes = Axes(capture(tiny("mpnet")))
    (units,) = heads(axes)
    found = places(axes, units)
    assert found["encoder.relative_attention_bias.weight.1"] == (1, 4, 1)
    assert len(units.outs) == 2
    assert len(found) == 1 + 2 * 7


def test_neurons_of_a_gated_pair_in_one_map(tiny):
    axes = Axes(capture(tiny("modernbert", num_hidden_layers=1)))
    (units,) = neurons(axes)
    assert places(axes, units) == {
        "layers.0.mlp.Wi.weight.0": (2, 64, 1),
        "layers.0.mlp.Wo.weight.1": (1, 64, 1),
    }


def test_the_stream_reaches_tables_norms_and_tied_head(tiny):
    model = tiny("bert", "AutoModelForMaskedLM", num_hidden_layers=1)
    axes = Axes(capture(model))
    (units,) = streams(axes)
    found = places(axes, units)
    widths = {name: (tensor, dim) for name, tensor in model.named_parameters() for dim in range(tensor.dim())}
    assert len(widths)
    missing = {
        f"{name}.{dim}"
        for name, tensor in model.named_parameters()
        for dim, size in enumerate(tensor.shape)
        if size == 32 and f"{name}.{dim}" not in found
    }
    prefix = "bert.encoder.layer.0.attention."
    rows = {
        f"{prefix}self.{name}.{part}.0" for name in ("query", "key", "value") for part in ("weight", "bias")
    }
    assert missing == {*rows, f"{prefix}output.dense.weight.1"}
    (table,) = (span for span in axes.spans(units.atom) if "word_embeddings" in span.names[0])
    assert set(table.names) == {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}


def test_tensors_that_no_module_owns_are_reached(tiny):
    axes = Axes(capture(tiny("vit", num_hidden_layers=1)))
    (units,) = streams(axes)
    found = places(axes, units)
    assert found["embeddings.cls_token.2"] == (1, 32, 1)
    assert found["embeddings.position_embeddings.2"] == (1, 32, 1)
    assert found["embeddings.patch_embeddings.projection.weight.0"] == (1, 32, 1)


@pytest.mark.parametrize("family", ["deberta-v2", "bart", "gpt_neo", "opt", "qwen3"])
def test_architectures_that_no_table_names(family, tiny):
    axes = Axes(capture(tiny(family)))
    found = [*heads(axes), *neurons(axes), *streams(axes)]
    assert len(found) >= 5
    assert [units.reason for units in found if units.reason] == []


def test_rows_of_tables_and_head_sizes_are_pinned(tiny):
    graph = capture(tiny("llama", num_hidden_layers=1))
    axes = Axes(graph)
    rows = axes.tensor(graph.model.embed_tokens.weight)[0][0]
    assert "looked up" in axes.obstacle(rows)
    (head_size,) = [
        atom for atom in axes.of(graph.calls("layers.0.self_attn.v_proj")[0])[-1] if atom.size == 8
    ]
    assert "size of a head" in axes.obstacle(head_size)


def test_a_norm_and_an_output_are_noted_and_do_not_pin(tiny):
    axes = Axes(capture(tiny("bert", num_hidden_layers=1)))
    (units,) = streams(axes)
    root = units.atom.root()
    assert not units.reason
    assert any("LayerNorm normalises over it" in what for what in root.statistics)
    assert list(root.outputs) == ["last_hidden_state"]


class Config(PretrainedConfig):
    model_type = "kroncc-axes-test"

    def __init__(self, body="", **kwargs):
        super().__init__(**kwargs)
        self.body = body


class Odd(PreTrainedModel):
    """One map up and down with something between."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4)
        self.post_init()

    def forward(self, pixel_values):
        return {"out": self.down(BODIES[self.config.body](self.up(pixel_values)))}


BODIES = {
    "relu": torch.relu,
    "sorted": lambda x: x.sort(-1).values,
    "softmax": lambda x: x.softmax(-1),
    "part": lambda x: torch.cat([x[..., :5], -x[..., 5:]], -1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "fft": lambda x: torch.fft.fft(x).real,
    "groups": lambda x: x.unflatten(-1, (3, 4)).flatten(-2),
}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("relu", ""),
        ("sorted", "sort"),
        ("softmax", "softmax in the model itself mixes it"),
        ("part", "takes a part of it"),
        ("mean", ""),
        ("fft", "not understood"),
        ("groups", "laid out in groups"),
    ],
)
def test_operators_between_two_maps(body, reason):
    model = Odd(Config(body))
    graph = capture(model, {"pixel_values": torch.zeros(3, 6)})
    units = features(Axes(graph), "up")
    assert reason in units.reason
    assert bool(reason) == bool(units.reason)

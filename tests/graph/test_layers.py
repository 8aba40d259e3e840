"""The lists of layers of many architectures, found without names, and what is seen of them."""

from __future__ import annotations

import pytest

from kroncc.graph.capture import capture
from kroncc.graph.layers import (
    LayerStack,
    find_stacks,
    has_cache,
    is_causal,
    layer_ends,
    lenders,
    watch_call,
)

STACKS = {
    "bert": ["encoder.layer"],
    "distilbert": ["transformer.layer"],
    "mpnet": ["encoder.layer"],
    "gpt2": ["h"],
    "llama": ["layers"],
    "qwen3": ["layers"],
    "modernbert": ["layers"],
    "deberta-v2": ["encoder.layer"],
    "vit": ["layers"],
    "t5": ["encoder.block", "decoder.block"],
    "gpt_neo": ["h"],
}
ANSWERS = {"mpnet": 1, "deberta-v2": 2, "gpt_neo": 2, "t5": 3}  # the others return a tensor
DECODERS = {"gpt2", "llama", "qwen3", "gpt_neo"}


@pytest.mark.parametrize("family", STACKS)
def test_stacks(tiny, family):
    graph = capture(tiny(family))
    stacks = find_stacks(graph)
    assert [stack.fqn for stack in stacks] == STACKS[family]
    places = [place for stack in stacks for place in stack.places]
    assert places == list(range(2 * len(stacks)))
    for stack in stacks:
        assert (stack.size, stack.width) == (2, 32)
        assert lenders(graph, stack) == ({0} if family == "t5" else set())
        assert is_causal(graph, stack) == (family in DECODERS or stack.fqn.startswith("decoder"))
        seen = watch_call(graph, stack)
        assert seen is not None
        assert seen.values == ANSWERS.get(family)
        assert seen.by_place.keys() == ({"layer_types"} if family == "qwen3" else set())
        ends = layer_ends(graph, stack)
        assert all(end is not None for end in ends)
        assert ends[0].leaves is ends[1].enters


def test_a_module_that_is_called_again_and_again_is_no_stack(tiny):
    assert find_stacks(capture(tiny("albert"))) == []


def test_watching_leaves_the_model_as_it_is(tiny):
    model = tiny("qwen3")
    graph = capture(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch_call(graph, find_stacks(graph)[0])
    assert type(model.config.layer_types) is list
    assert not any(layer._forward_hooks for layer in model.layers)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_which_stacks_keep_a_cache(tiny):
    for family, cached in (("llama", True), ("modernbert", False)):
        graph = capture(tiny(family))
        assert has_cache(graph.model, find_stacks(graph)[0]) is cached


def test_index():
    stack = LayerStack("encoder.layer", 2, 32, (0, 1))
    assert stack.entry(1) == "encoder.layer.1"
    assert stack.index("encoder.layer.1") == 1
    assert stack.index("encoder.layer.0.output.dense") == 0
    assert stack.index("encoder.layer") is None
    assert stack.index("encoder.layernorm.0") is None
    assert stack.index("decoder.layer.0") is None

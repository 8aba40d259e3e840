"""Blocks cut a model at its layers, and run in a row they are the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kroncc.graph.blocks import find_blocks, join, shared_spans
from kroncc.graph.capture import capture
from kroncc.graph.segment import Segment
from kroncc.graph.wavefront import Wavefront

ENCODER = ["embeddings", "layer 0", "layer 1", "head"]
BOTH = ["embeddings", "layer 0", "layer 1", "embeddings", "layer 2", "layer 3", "head"]
NAMES = {
    ("bert", "AutoModelForSequenceClassification"): ENCODER,
    ("gpt2", "AutoModelForCausalLM"): ENCODER,
    ("llama", "AutoModel"): ENCODER[:3],
    ("t5", "AutoModelForSeq2SeqLM"): BOTH,
}


@pytest.mark.parametrize(("family", "auto"), NAMES)
def test_blocks_in_a_row_are_the_model(tiny: Any, inputs_for: Any, family: str, auto: str) -> None:
    """Each block gets what the ones before it gave; their values are those of the wavefront at their ends."""
    mg = capture(tiny(family, auto))
    blocks = find_blocks(mg)
    assert [block.name for block in blocks] == NAMES[family, auto]
    batch = inputs_for(mg.inputs)
    wave = Wavefront(mg, [batch])
    with torch.no_grad():
        outputs = mg.module(**batch)
        for block in blocks:
            wave.advance(block.start)
            segment = block.segment(mg)
            values = segment([wave.value(node, 0) for node in segment.inputs])
            last = block.ends[-1]
            if block.kind != "head":
                wave.advance(last.next)
                assert torch.equal(values[-1], wave.value(last, 0))
    named = {node: name for name, node in mg.outputs.items()}
    for end, value in zip(blocks[-1].ends, values, strict=True):
        assert end not in named or torch.equal(value, outputs[named[end]])


def test_a_segment_trains_its_own_parameters_only(tiny: Any, inputs_for: Any) -> None:
    model = tiny("bert")
    mg = capture(model)
    block = find_blocks(mg)[2]
    segment = block.segment(mg)
    own = {name for name, _ in model.named_parameters() if name.startswith("encoder.layer.1.")}
    assert segment.parameters().keys() == own
    wave = Wavefront(mg, [inputs_for(mg.inputs)])
    wave.advance(block.start)
    (value,) = segment([wave.value(node, 0) for node in segment.inputs])
    value.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == own


def test_what_a_segment_writes_into_is_copied(tiny: Any, inputs_for: Any) -> None:
    """T5's decoder shifts its tokens by writing into a buffer; a segment that starts in between may not."""
    mg = capture(tiny("bart", "AutoModel"))
    batch = inputs_for(mg.inputs)
    wave = Wavefront(mg, [batch])
    with torch.no_grad():
        expected = mg.module(**batch)["last_hidden_state"]
        for node in list(mg.graph.nodes)[5:-1:7]:
            wave.advance(node)
            segment = Segment(mg, node, [mg.outputs["last_hidden_state"]])
            values = [wave.value(one, 0) for one in segment.inputs]
            for _ in range(2):  # the second time finds the inputs as they were
                assert torch.equal(segment(values)[0], expected)


def test_a_layer_that_is_called_again_is_one_block(tiny: Any) -> None:
    mg = capture(tiny("albert", num_hidden_layers=3))
    blocks = find_blocks(mg)
    spans = shared_spans(mg, blocks)
    assert spans == [range(0, 1), range(1, 4), range(4, 5)]
    whole = join([blocks[at] for at in spans[1]])
    assert (whole.name, len(whole.ends), whole.start) == ("layers 0-2", 3, blocks[1].start)


def test_groups_of_shared_layers_are_a_block_each(tiny: Any) -> None:
    model = tiny("bert", num_hidden_layers=5)
    layers = model.encoder.layer
    layers[1], layers[4] = layers[0], layers[2]
    mg = capture(tiny("bert", num_hidden_layers=5)).bind(model)
    assert shared_spans(mg, find_blocks(mg))[1:3] == [range(1, 3), range(3, 6)]


def test_a_small_shared_part_does_not_join_layers(tiny: Any) -> None:
    mg = capture(tiny("deberta-v2"))  # both layers read one table of relative positions
    assert shared_spans(mg, find_blocks(mg)) == [range(at, at + 1) for at in range(3)]


def test_a_model_without_layers_has_no_blocks(tiny: Any) -> None:
    mg = capture(tiny("bert"))
    for layer in mg.model.encoder.layer:
        for part in (layer.attention.self, layer.output):
            for name, module in part.named_children():
                if isinstance(module, nn.Linear):
                    setattr(part, name, nn.Identity())
    bound = mg.bind(mg.model)
    for node in list(bound.graph.nodes):
        if str(node.target).endswith("sdpa"):
            node.replace_all_uses_with(node.args[0])
            bound.graph.erase_node(node)
    assert find_blocks(bound) == []

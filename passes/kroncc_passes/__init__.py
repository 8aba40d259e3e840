"""The built-in passes: recipe name -> "module:Class", loaded when first used."""

PASSES: dict[str, str] = {
    "drop-layers": "kroncc_passes.drop_layers:DropLayers",
    "embedding": "kroncc_passes.embedding:Embedding",
    "kronecker": "kroncc_passes.kronecker:Kronecker",
    "low-rank": "kroncc_passes.low_rank:LowRank",
    "prune-heads": "kroncc_passes.prune_heads:PruneHeads",
    "prune-hidden": "kroncc_passes.prune_hidden:PruneHidden",
    "prune-neurons": "kroncc_passes.prune_neurons:PruneNeurons",
    "prune-weights": "kroncc_passes.prune_weights:PruneWeights",
    "quantize": "kroncc_passes.quantize:Quantize",
    "squeeze": "kroncc_passes.squeeze:Squeeze",
    "share-layers": "kroncc_passes.share_layers:ShareLayers",
    "student": "kroncc_passes.student:Student",
    "vocabulary": "kroncc_passes.vocabulary:Vocabulary",
}

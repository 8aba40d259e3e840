"""The built-in passes: recipe name -> "module:Class", loaded when first used."""

PASSES: dict[str, str] = {
    "drop-layers": "kroncc_passes.drop_layers:DropLayers",
    "kronecker": "kroncc_passes.kronecker:Kronecker",
    "low-rank": "kroncc_passes.low_rank:LowRank",
}

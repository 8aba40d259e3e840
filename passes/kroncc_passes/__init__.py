"""The built-in passes: recipe name -> "module:Class", loaded when first used."""

PASSES: dict[str, str] = {
    "kronecker": "kroncc_passes.kronecker:Kronecker",
    "low-rank": "kroncc_passes.low_rank:LowRank",
}

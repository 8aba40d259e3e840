"""A package that brings one pass to kroncc."""

PASSES = {"block-diagonal": "example_plugin.block_diagonal:BlockDiagonal"}

"""`python -m benchmarks NAME`: run one benchmark and print its table."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "kronecker-init": "nearest product against the singular value decomposition of the rearranged weight",
    "kronecker-forward": "factored layers against the dense layer, inference and a training step",
    "fitting": "starts of a distillation on SST-2: nearest, weighted, sequential, reconstructed",
    "methods": "every method at the setting of its recipe, on SST-2",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that `arguments` names; return the exit code."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [OPTIONS]")
        for name, about in BENCHMARKS.items():
            print(f"  {name:<18} {about}")
        return 2
    main_of = importlib.import_module(f"benchmarks.{arguments[0].replace('-', '_')}").main
    options = arguments[1:]
    if options:
        main_of(options)
    else:
        main_of()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

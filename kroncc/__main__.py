"""`python -m kroncc`: the command line."""

import sys

from kroncc.cli import main

sys.exit(main())

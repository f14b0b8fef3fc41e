"""``python -m gradalign``: the command line."""

import sys

from gradalign.cli import main

sys.exit(main())

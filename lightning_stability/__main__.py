"""``python -m lightning_stability`` is the ``lightning-stability`` command."""

import sys

from lightning_stability.cli import main

sys.exit(main())

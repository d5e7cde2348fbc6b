"""`python -m segfast` is the `segfast` command."""

import sys

from .cli import main

sys.exit(main())

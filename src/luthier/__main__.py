"""`python -m luthier`, the same as `luthier`."""

import sys

from luthier.cli import main

sys.exit(main())

"""`python -m metaopt` is the command `metaopt`."""

import sys

from metaopt import _cli

sys.exit(_cli.main())

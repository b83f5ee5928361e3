"""Python runs this file when a kernel of the site starts: `docs/conf.py` puts its folder on the path."""

import gc

# Tracing makes many objects. Python looks for cycles among them so often that this takes a tenth of the cells' time.
gc.set_threshold(200_000, 20, 100)

"""``python -m seqmodels``, the same as the command ``seqmodels``.

Imports go down only, and the commands are a floor above this library. So nothing here imports them
but the program itself, by name and when it runs; who imports ``seqmodels`` never gets them.
"""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("experiments.main").main())

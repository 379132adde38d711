"""CIFAR-10 in colour, pixel by pixel, 1,024 steps of three channels, by Image's settings.

Data: --data-dir with cifar-10-binary.tar.gz (162 MB) or the Python version.
"""

from experiments.lra.presets import image
from experiments.lra.presets.models import Presets

PRESETS = Presets("cifar", published={}, like=image.PRESETS, changes=image.PRESETS.changes)

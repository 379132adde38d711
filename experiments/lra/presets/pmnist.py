"""Permuted MNIST, 784 pixels in one random order, by Image's settings.

Data: --data-dir with the four files of MNIST (12 MB).
"""

from experiments.lra.presets import image
from experiments.lra.presets.models import Presets

PRESETS = Presets("pmnist", published={}, like=image.PRESETS, changes=image.PRESETS.changes)

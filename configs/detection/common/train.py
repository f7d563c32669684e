"""Settings of the run: the defaults, which are listed in ``revdet/config.py``."""

from copy import deepcopy

from revdet.config import TRAIN_DEFAULTS

train = deepcopy(TRAIN_DEFAULTS)

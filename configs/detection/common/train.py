"""Settings of the run: the defaults, which are listed in ``revdet/settings.py``."""

from dataclasses import asdict

from omegaconf import OmegaConf

from revdet.settings import TrainConfig

train = OmegaConf.create(asdict(TrainConfig()))

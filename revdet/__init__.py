"""Detectron2 adapter: detectors on the backbones of :mod:`backbones`."""

import logging
import warnings

# Detectron2 is older than the torch it runs on here; its users cannot act on these.
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", module="torch")
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # of RLE masks
for _name in (
    "torch.utils.cpp_extension",
    "torch.fx._symbolic_trace",
    "detectron2.data.common",
    "detectron2.data.datasets.coco",
    "detectron2.data.dataset_mapper",
):
    logging.getLogger(_name).setLevel(logging.ERROR)

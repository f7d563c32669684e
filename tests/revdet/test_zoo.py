"""Detectron2's own ViTDet, saved as its zoo saves: all of it loads, and computes the same."""

from __future__ import annotations

import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import ViT
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from iopath.common.file_io import g_pathmgr
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from backbones.common.errors import UserError
from backbones.weights.download import ZOO
from revdet.config import load_config
from revdet.data.datasets import register_datasets
from revdet.models import build_model
from revdet.training.checkpoint import Checkpointer, load_initial_weights
from revdet.training.weights import fetch_weights
from tests.revdet.test_recipes import small

TWIN = "configs/detection/coco/mask_rcnn_vit_base_100ep.py"
REVERSIBLE = TWIN.replace("_vit_", "_rev_vit_")
FEW = ["model.roi_heads.box_predictor.test_score_thresh=0.0"]
MEAN = [f"model.backbone.net.model.{key}" for key in ("fuse=mean", "final_norm=False")]
MEAN += ["model.backbone.net.model.pretrain_img_size=224"]


def recipe(path: str, *overrides: str) -> Any:
    return load_config(path, [*small(path), *FEW, *overrides])


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """Detectron2's model of the twin's sizes, with weights that nothing has initialised to zero."""
    cfg = recipe(TWIN).model
    cfg.backbone.net = L(ViT)(
        img_size=64,
        embed_dim=16,
        depth=3,
        num_heads=2,
        drop_path_rate=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=2,
        window_block_indexes=[0, 1],
        use_rel_pos=True,
        out_feature="last_feat",
    )
    cfg.backbone.in_feature = "last_feat"
    torch.manual_seed(0)
    model = instantiate(cfg)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.05)
    return model


@pytest.fixture(scope="module")
def file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "model_final_61ccd1.pkl"
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    arrays["pixel_mean"] = theirs.pixel_mean.numpy()  # as files of earlier versions
    with path.open("wb") as opened:
        pickle.dump({"model": arrays, "__author__": "Detectron2"}, opened)
    return path


@pytest.fixture(scope="module")
def images(datasets_root: Path) -> list[dict[str, Any]]:
    """Two photographs of the demo, of different sizes, with boxes and masks."""
    register_datasets()
    inputs = []
    for record, size in zip(DatasetCatalog.get("demo_train"), ((64, 48), (56, 64)), strict=False):
        picture = Image.open(record["file_name"]).convert("RGB").resize(size)
        instances = Instances(size[::-1])
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 8.0, 44.0, 28.0]]))
        instances.gt_classes = torch.tensor([3, 50])
        masks = torch.zeros(2, *size[::-1], dtype=torch.bool)
        masks[0, 10:36, 6:28] = masks[1, 8:28, 20:44] = True
        instances.gt_masks = BitMasks(masks)
        both = {"height": 2 * size[1], "width": 2 * size[0], "instances": instances}
        inputs.append({"image": pil_to_tensor(picture), **both})
    return inputs


def losses(model: nn.Module, images: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a training step, and the gradient of the first layer."""
    torch.manual_seed(3)
    for module in model.train().modules():
        if hasattr(module, "drop_path"):
            module.drop_path = nn.Identity() if isinstance(module.drop_path, nn.Module) else 0.0
    with EventStorage():
        total = sum(model(images).values())
    weight = next(p for n, p in model.named_parameters() if n.endswith("patch_embed.proj.weight"))
    return total.detach(), torch.autograd.grad(total, weight)[0]


def test_a_whole_vitdet_computes_the_same(theirs, file, images):
    ours = build_model(recipe(TWIN))
    Checkpointer(ours).load(str(file))  # as --eval-only and predict do
    with torch.no_grad():
        # Before masks are cut off at a half, where rounding decides.
        pairs = [m.eval().inference(images, do_postprocess=False) for m in (theirs, ours)]
    for expected, found in zip(*pairs, strict=True):
        assert len(found) == len(expected) > 5
        for field in ("pred_boxes", "scores", "pred_masks", "pred_classes"):
            one, other = (getattr(o.get(field), "tensor", o.get(field)) for o in (expected, found))
            pixels = 1e-3 if field == "pred_boxes" else 1e-5
            torch.testing.assert_close(other, one, rtol=1e-4, atol=pixels)
    again = build_model(recipe(TWIN))
    load_initial_weights(again, str(file))  # as training does
    (expected, gradient), (loss, grad) = losses(theirs, images), losses(again, images)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_reversible_detector_starts_from_it(theirs, file, images, caplog):
    mean, concat = build_model(recipe(REVERSIBLE, *MEAN)), build_model(recipe(REVERSIBLE))
    before = {name: value.clone() for name, value in concat.state_dict().items()}
    with pytest.raises(UserError, match=r"plain trunk.*before"):
        Checkpointer(mean).load(str(file))
    with caplog.at_level(logging.INFO, logger="revdet"):
        load_initial_weights(mean, str(file))
    assert "converted blocks" in caplog.text
    again, own = build_model(recipe(REVERSIBLE, *MEAN)), build_model(recipe(TWIN))
    load_initial_weights(own, str(file))
    Checkpointer(own, str(file.parent)).save("own")
    load_initial_weights(again, str(file.parent / "own.pth"))
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in mean.state_dict().items())
    state = theirs.state_dict()
    for name, value in mean.state_dict().items():
        if ".net." not in name:
            assert torch.equal(value, state[name]), name  # pyramid and heads, all of them
    assert all(torch.isfinite(value).all() for value in losses(mean, images))

    # Twice as wide, the pyramid starts as if it saw the mean of the streams.
    load_initial_weights(concat, str(file))
    unchanged = [n for n, value in concat.state_dict().items() if torch.equal(value, before[n])]
    assert unchanged == [f"backbone.net.model.norm.{end}" for end in ("weight", "bias")]
    with torch.no_grad():
        for narrow, wide in zip(theirs.backbone.stages, concat.backbone.stages, strict=True):
            one, two = torch.randn(2, 1, 16, 4, 4)
            if isinstance(narrow[0], nn.MaxPool2d):  # of two streams, the mean of the maxima
                two = one
            expected = narrow((one + two) / 2)
            got = wide(torch.cat([one, two], dim=1))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused_and_nothing_changed(theirs, file, tmp_path):
    deeper = build_model(recipe(TWIN, "model.backbone.net.model.depth=4"))
    before = {name: value.clone() for name, value in deeper.state_dict().items()}
    for load in (Checkpointer(deeper).load, partial(load_initial_weights, deeper)):
        with pytest.raises(UserError, match=r"the trunk in .*Detectron2's.*not in the file"):
            load(str(file))
    trunk = "model.backbone.net.model."
    earlier = build_model(recipe(TWIN, f"{trunk}final_norm=True", f"{trunk}pretrain_img_size=64"))
    Checkpointer(earlier, str(tmp_path)).save("earlier")  # as the recipe was before
    with pytest.raises(
        UserError, match=r"1 weights have another shape.*2 weights are unknown.*con"
    ):
        Checkpointer(build_model(recipe(TWIN))).load(str(tmp_path / "earlier.pth"))
    other = tmp_path / "resnet.pth"
    heads = {n: v for n, v in theirs.state_dict().items() if not n.startswith("backbone.")}
    torch.save({"model": heads}, other)
    with pytest.raises(UserError, match="another trunk than a vision transformer"):
        load_initial_weights(deeper, str(other))
    heads["roi_heads.box_head.fc1.weight"] = heads["roi_heads.box_head.fc1.weight"].to(torch.cfloat)
    torch.save({"model": heads}, other)
    with pytest.raises(UserError, match=r"more than plain numbers: roi_heads\.box_head\.fc1"):
        load_initial_weights(deeper, str(other))
    assert all(torch.equal(value, before[n]) for n, value in deeper.state_dict().items())


def test_names_of_the_zoo_go_through_the_path_manager(monkeypatch, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    asked: list[str] = []

    def local(address: str) -> str:
        asked.append(address)
        if "dinov2" in address:
            raise OSError("no route to host")
        return str(file)

    monkeypatch.setattr(g_pathmgr, "get_local_path", local)
    assert fetch_weights("mae_vit_base") == fetch_weights("detectron2://a/b.pkl") == file
    assert asked == [ZOO["mae_vit_base"], "detectron2://a/b.pkl"]
    with pytest.raises(UserError, match=r"dinov2_vit_base: .*https.*no route to host.*elsewhere"):
        fetch_weights("dinov2_vit_base")

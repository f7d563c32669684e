"""Files of weights: damaged, of other layouts, with code in them."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.running import damaged


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def layouts() -> dict[str, dict[str, Any]]:
    """A ViT of one block by the names of timm, DINOv2, ViTDet, Hugging Face and torchvision."""
    import torch

    width = 24
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (width, 3, 16, 16), "norm": (width,)}
    shapes |= {"blocks.0.norm1": (width,), "blocks.0.norm2": (width,), "head": (3, width)}
    shapes |= {"blocks.0.attn.qkv": (3 * width, width), "blocks.0.attn.proj": (width, width)}
    shapes |= {"blocks.0.mlp.fc1": (4 * width, width), "blocks.0.mlp.fc2": (width, 4 * width)}
    timm = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    timm |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    timm |= {"cls_token": torch.randn(1, 1, width), "pos_embed": torch.randn(1, 5, width)}
    dino = timm | {f"blocks.0.ls{n}.gamma": torch.randn(width) for n in (1, 2)}
    dino |= {"register_tokens": torch.randn(1, 4, width), "mask_token": torch.randn(1, width)}
    tables = {f"blocks.0.attn.rel_pos_{axis}": torch.randn(3, 8) for axis in "hw"}
    body = {k: v for k, v in timm.items() if not k.startswith(("norm.", "head.", "cls_"))}
    vitdet = {f"backbone.net.{name}": value for name, value in (body | tables).items()}
    vitdet["backbone.simfp_2.0.weight"] = vitdet["roi_heads.x.bias"] = torch.randn(width)
    renames = {
        "Hugging Face": "blocks.=encoder.layer. norm1=layernorm_before norm2=layernorm_after "
        "attn.proj=attention.output.dense mlp.fc1=intermediate.dense mlp.fc2=output.dense "
        "pos_embed=embeddings.position_embeddings cls_token=embeddings.cls_token head=classifier "
        "patch_embed.proj=embeddings.patch_embeddings.projection",
        "torchvision": "blocks.=encoder.layers.encoder_layer_ norm1=ln_1 norm2=ln_2 mlp.fc1=mlp.0 "
        "mlp.fc2=mlp.3 attn.qkv.=self_attention.in_proj_ attn.proj=self_attention.out_proj "
        "patch_embed.proj=conv_proj pos_embed=encoder.pos_embedding cls_token=class_token",
    }
    found = {"timm": timm, "DINOv2": dino, "ViTDet": vitdet}
    for layout, pairs in renames.items():
        found[layout] = {}
        for name, value in timm.items():
            for ours, theirs in (pair.split("=") for pair in pairs.split()):
                name = name.replace(ours, theirs)
            if layout == "Hugging Face" and ".attn.qkv." in name:
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[layout][name.replace("attn.qkv", f"attention.attention.{part}")] = rows
            else:
                found[layout][name] = value
    return found


class Checkpoints:
    """Weights of a trunk, own and foreign: damaged, of other names, types and shapes, with code."""

    def __init__(self, folder: Path) -> None:
        import torch

        import backbones

        self.mark, self.folder = folder / "executed", folder
        sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_classes": 3}
        positions = {"use_rel_pos": True, "final_norm": False}
        kinds: dict[str, dict[str, Any]] = {"rev_vit_tiny": {"fuse": "mean"}}
        kinds["vit_tiny"] = {"class_token": True, "num_registers": 4}
        self.models = [
            functools.partial(backbones.create_model, name, **sizes, **more)
            for name, more in [("rev_vit_tiny", {}), *kinds.items(), ("vit_tiny", positions)]
        ]
        own = self.models[0]()
        torch.save(own.state_dict(), folder / "good.pth")
        backbones.save_weights(own, folder / "good.safetensors")
        self.sources = [own.state_dict(), *layouts().values()]

    def case(self, rnd: random.Random, path: Path) -> Callable[[], Any]:
        import torch

        make = rnd.choice(self.models)
        if rnd.random() < 0.2:
            file = self.folder / rnd.choice(["good.pth", "good.safetensors"])
            path.write_bytes(damaged(file.read_bytes(), rnd))
            return lambda: self.load(make, path)
        content: dict[Any, Any] = dict(rnd.choice(self.sources))
        evil = Evil(self.mark)
        for _ in range(rnd.choice([0, 1, 1, 3])):
            self.change(content, rnd, evil)
        nests = [content, {"model": content, "epoch": 3}, {"state_dict": {"model": content}}]
        nests += [{"teacher": content, "student": content}, {"model": {}, "model_ema": content}]
        nests += [{"model": content, "args": evil}, [content], 5, evil, {}, {"model": [content]}]
        nested: Any = rnd.choice([*nests[:5], *nests])
        if rnd.random() < 0.5:
            torch.save(nested, path)
        else:
            path.write_bytes(pickle.dumps(arrays_in(nested, rnd), protocol=rnd.choice([2, 4, 5])))
        if rnd.random() < 0.2:
            path.write_bytes(damaged(path.read_bytes(), rnd))
        return lambda: self.load(make, path)

    def change(self, content: dict[Any, Any], rnd: random.Random, evil: Evil) -> None:
        import torch

        key = rnd.choice([*content])
        value = content[key]
        match rnd.choice(["value", "value", "drop", "twice", "prefix", "other"]):
            case "drop":
                del content[key]
            case "twice":
                content[f"module.{key}"] = value
            case "prefix":
                start = rnd.choice(["module.", "backbone.net.", "teacher.", "encoder.", "\0", "."])
                renamed = {f"{start}{name}": tensor for name, tensor in content.items()}
                content.clear()
                content.update(renamed)
            case how if is_plain(value):
                odd: list[Any] = [
                    evil,
                    torch.zeros(0),
                    None,
                    "x",
                    torch.zeros(1),
                    10**400,
                    value[:1],
                ]
                odd += [torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 0, 3), value[None]]
                odd += [value.to(t) for t in (torch.int32, torch.float64, torch.complex64)]
                odd += [value.float().reshape(1, -1).to_sparse(), value * float("nan")]
                odd += [torch.cat([value, value]), value.half(), torch.quantize_per_tensor]
                content[key if how == "value" else rnd.choice(["other", 5])] = rnd.choice(odd)

    def load(self, make: Callable[[], Any], path: Path) -> None:
        import torch

        import backbones

        model = make()
        before = copy.deepcopy(model.state_dict())
        try:
            backbones.load_weights(model, path)
        except Exception:
            after = model.state_dict()
            assert all(torch.equal(before[key], after[key]) for key in before), "half loaded"
            raise


def is_plain(value: Any) -> bool:
    """Whether it is a tensor that has not been made odd before."""
    import torch

    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return strided and value.numel() <= 10**6


def arrays_in(tree: Any, rnd: random.Random) -> Any:
    """A tree with NumPy's arrays in place of tensors, as files of Detectron2's zoo have them."""
    import numpy as np

    if isinstance(tree, dict):
        return {key: arrays_in(value, rnd) for key, value in tree.items()}
    if isinstance(tree, list):
        return [arrays_in(value, rnd) for value in tree]
    if not is_plain(tree):
        return tree
    array = tree.numpy()
    if rnd.random() < 0.003:
        odd = [array.astype(object), array.astype("U9"), array.astype(">f4"), np.float32(3)]
        odd += [np.asfortranarray(array), np.ma.array(array), array.view(np.recarray)]
        return rnd.choice([*odd, np.zeros(3, "f4,i4"), np.datetime64("2020"), np.dtype("f4")])
    return array

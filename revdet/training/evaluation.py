"""COCO metrics, with faster-coco-eval in place of Detectron2's compiled evaluator."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils import comm
from faster_coco_eval import COCO, COCOeval_faster
from omegaconf import DictConfig
from torch import nn

from backbones.common.errors import first_line
from backbones.common.files import set_aside, write_json
from backbones.common.sharding import whole
from backbones.weights.checkpoint import read_checkpoint
from revdet.training.checkpoint import Checkpointer

logger = logging.getLogger("revdet")

# The score by which the best checkpoint is told.
BEST = "bbox/AP"


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` on faster-coco-eval, whose numbers are those of pycocotools.

    Args as for ``COCOEvaluator``, for boxes and masks. Metrics are in COCO points, 0 to 100; NaN
    for an area range without ground truth. A model that predicts nothing scores 0.
    """

    _coco_api: Any

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        content = self._coco_api.dataset
        # faster-coco-eval takes no images whose ids are negative: it sees others.
        self._shift = max(0, -min((image["id"] for image in content["images"]), default=0))
        for entries, key in (("images", "id"), ("annotations", "image_id")):
            for entry in content.get(entries, ()):
                entry[key] += self._shift
        self._coco_api = COCO(content)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        dataset_id = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        for result in results:
            result["category_id"] = dataset_id[result["category_id"]]
        if self._output_dir:
            write_json(Path(self._output_dir, "coco_instances_results.json"), results, indent=None)
        if not self._do_evaluation:  # a test set without annotations
            return
        for result in results:
            result["image_id"] += self._shift
        shifted = None if img_ids is None else [number + self._shift for number in img_ids]
        for task in self._tasks or self._tasks_from_predictions(results):
            self._results[task] = self._evaluate_task(task, results, shifted)

    def _evaluate_task(self, task: str, results: list[dict[str, Any]], img_ids: Any) -> Any:
        class_names = self._metadata.get("thing_classes")
        if not results:
            return dict.fromkeys(self._derive_coco_results(None, task, class_names), 0.0)
        if task == "segm":  # whose area is then that of the mask, as in Detectron2, not of the box
            results = [{k: v for k, v in each.items() if k != "bbox"} for each in results]
        evaluation = COCOeval_faster(self._coco_api, self._coco_api.loadRes(results), task)
        evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.run()
        return self._derive_coco_results(evaluation, task, class_names)


class Evaluations:
    """Evaluates during training and keeps the best weights in ``model_best.pth``."""

    def __init__(self, cfg: DictConfig, checkpointer: Checkpointer, *, resume: bool) -> None:
        self.cfg, self.checkpointer = cfg, checkpointer
        self.last: dict[str, Any] = {}  # metrics; empty but on the main process
        self.best: dict[str, float] = {}  # iteration and score; empty if there is none
        file = Path(cfg.train.output_dir) / "model_best.pth"
        if resume and file.is_file():
            # The file itself says what it scored, so that the two cannot disagree.
            try:
                content = read_checkpoint(file).content
                self.best = {key: content[key] for key in ("iteration", BEST)}
            except (KeyError, ValueError) as error:
                if comm.is_main_process():
                    aside = set_aside(file)
                    logger.warning(f"{file} is damaged ({first_line(error)}): it is {aside} now")

    def run(self, iteration: int) -> dict[str, Any]:
        """Evaluate behind an iteration, and save the weights if they are better than any before."""
        self.last = evaluate(self.cfg, self.checkpointer.model)
        score = self.last.get("bbox", {}).get("AP", float("nan"))
        better = score > self.best.get(BEST, float("-inf"))  # never true for NaN
        if comm.all_gather(better)[0]:  # only the main process knows the score
            self.best = {"iteration": iteration + 1, BEST: score}
            self.checkpointer.save_weights("model_best", **self.best)
        return self.last


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """COCO metrics on the recipe's test set, in COCO points; empty but on the main process."""
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    with whole(model):
        return inference_on_dataset(model, loader, evaluator) or {}

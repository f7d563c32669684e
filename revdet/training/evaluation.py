"""COCO metrics with faster-coco-eval in place of Detectron2's compiled evaluator."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator
from faster_coco_eval import COCO, COCOeval_faster


class FasterCOCOEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` on faster-coco-eval, whose numbers are those of pycocotools.

    Args as for ``COCOEvaluator``, for boxes and masks. Metrics are in COCO points, 0 to 100; NaN
    for an area range without ground truth. A model that predicts nothing scores 0.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api = COCO(self._metadata.json_file)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        dataset_id = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        for result in results:
            result["category_id"] = dataset_id[result["category_id"]]
        if self._output_dir:
            Path(self._output_dir, "coco_instances_results.json").write_text(json.dumps(results))
        if not self._do_evaluation:  # a test set without annotations
            return
        for task in self._tasks or self._tasks_from_predictions(results):
            self._results[task] = self._evaluate_task(task, results, img_ids)

    def _evaluate_task(self, task: str, results: list[dict[str, Any]], img_ids: Any) -> Any:
        class_names = self._metadata.get("thing_classes")
        if not results:
            empty = self._derive_coco_results(None, task, class_names)
            return {metric: 0.0 for metric in empty}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval_faster(
                self._coco_api, self._coco_api.loadRes(results), iouType=task
            )
            evaluation.params.maxDets = self._max_dets_per_image
            if img_ids is not None:
                evaluation.params.imgIds = img_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return self._derive_coco_results(evaluation, task, class_names)


def to_json(metrics: Any) -> Any:
    """Metrics with None in place of NaN, which JSON does not have."""
    if isinstance(metrics, dict):
        return {key: to_json(value) for key, value in metrics.items()}
    return None if isinstance(metrics, float) and math.isnan(metrics) else metrics

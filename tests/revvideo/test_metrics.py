"""metrics.csv: whole lines, none of them twice, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from revvideo.training.metrics import MetricsLogger, cut_metrics, read_metrics


# Between two lines, after a comma, within a number, and within an exponent.
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 11])
def test_a_resumed_session_continues_whatever_a_kill_has_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsLogger(path)
    for step in range(3):
        first.log_metrics({"train/loss": 1.25, "lr": 1.5e-7}, step=step)
    content = path.read_text()
    assert content.endswith("2,1.25,1.5e-07\n")
    path.write_text(content[: len(content) - cut])
    assert len(read_metrics(path)) == (3 if cut == 0 else 2)
    cut_metrics(path, 2)
    second = MetricsLogger(path)
    second.log_metrics({"train/loss": 0.5, "lr": 1e-7}, step=2)
    second.log_metrics({"val/top1": 50.0}, step=3)  # a column that the lines before have not
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {"step": 1, "train/loss": 1.25, "lr": 1.5e-7}
    assert rows[2:] == [{"step": 2, "train/loss": 0.5, "lr": 1e-7}, {"step": 3, "val/top1": 50.0}]

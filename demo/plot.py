"""Draws the learning curve from the trainer's JSON lines: `python -m kvfold.demo.plot`. Needs
matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Centred mean, shorter at the ends."""
    half = window // 2
    spans = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def plot(curve: Path, out: Path) -> None:
    """Answer accuracy, text loss and the held-out probes against the tokens seen."""
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, label in (
        ("answer_accuracy", "answer tokens, accuracy"),
        ("text_loss", "prose, nats per token"),
    ):
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        left.plot([x for x, _ in points], smooth([y for _, y in points]), label=label)
    left.set_title("training texts")
    for name in sorted({key for row in rows for key in row if "@" in key}):
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if name in row]
        right.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
    right.set_title("held-out tasks, whole answer exact")
    for axes in (left, right):
        axes.set_xlabel("tokens seen, millions")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylim(0, 3)
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--curve", type=Path, default=here / "curve.jsonl")
    parser.add_argument("--out", type=Path, default=here / "learning_curve.png")
    arguments = parser.parse_args()
    plot(arguments.curve, arguments.out)


if __name__ == "__main__":
    main()

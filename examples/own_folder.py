"""Train on a folder of good images, set the false-alarm rate with other good images, and score new ones.

python examples/own_folder.py data/ new/ --good good/ --out results/
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from twinspect import Detector, TwinspectError


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with good images, a folder for each product")
    parser.add_argument("new", type=Path, help="folder with images to inspect")
    parser.add_argument("--good", type=Path, help="good images of another day, to set the threshold with")
    parser.add_argument("--max-fpr", type=float, default=0.02, help="share of good images that may be called bad")
    parser.add_argument("--effort", default="fast", help="fast for a first try, default for the real model")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the model and the table")
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    detector = Detector(effort=given.effort).fit(given.data)
    for skipped in detector.skipped_:
        print(f"left out {skipped.path}: {skipped.reason}")
    if given.good:
        try:
            detector.calibrate(given.good, max_fpr=given.max_fpr)
        except TwinspectError as error:  # too few images for that rate: the message says how many are needed
            print(f"the thresholds stay as they are: {error}")
    print(f"model: {detector.save(given.out / 'model.twin')}")

    with (given.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "score", "threshold", "answer", "regions"])
        for result in detector.predict(given.new, stream=True):
            if result.error:
                print(f"{result.path}: {result.error}")
                continue
            regions = len(result.regions)
            table.writerow([result.path, result.class_name, result.score, result.threshold, result.answer, regions])
            if result.is_anomaly:
                result.overlay().save(given.out / f"{Path(result.path).stem}.png")
    print(f"table: {given.out / 'table.csv'}")


if __name__ == "__main__":
    main()

"""One run of the project's own command that waits for orders between epochs; started by first.py in the project.

    python probe.py FOLDER OVERRIDE...

FOLDER/epochs gets a JSON line whenever an epoch may start; FOLDER/order says how many epochs may run in all, or -1:
one more, then on to merging, the last evaluation and the record. A run that waits uses neither GPU nor CPU, so that
many can be compiled at once and then timed one by one, or side by side.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

from repmlp.runs import fit

FOLDER = Path(sys.argv[1] if __name__ == "__main__" else ".")


class Ordered(fit.History):
    """Tells the seconds of each epoch, training as the project counts it (synchronised) and the rest."""

    trained, resumed, last = 0.0, 0.0, False

    def on_train_epoch_start(self, trainer, module) -> None:
        done, train = trainer.current_epoch, self.train_seconds - self.trained
        rest = time.perf_counter() - self.resumed - train if done else 0.0
        with open(FOLDER / "epochs", "a") as file:
            file.write(json.dumps({"done": done, "train": train, "rest": rest, "time": time.time()}) + "\n")
        while 0 <= (order := int((FOLDER / "order").read_text())) <= done:
            time.sleep(0.005)
        self.last = order < 0
        self.trained, self.resumed = self.train_seconds, time.perf_counter()
        super().on_train_epoch_start(trainer, module)  # after the wait, which is no training

    def on_train_epoch_end(self, trainer, module) -> None:
        super().on_train_epoch_end(trainer, module)
        if self.last:
            trainer.should_stop = True


if __name__ == "__main__":
    fit.History = Ordered
    sys.argv = ["experiments/ablate.py", *sys.argv[2:]]
    sys.path.insert(0, "experiments")
    runpy.run_path("experiments/ablate.py", run_name="__main__")

# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe with a fault after its second update; takes the recipe's arguments.

python failing_run.py learner|evaluation SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.objectives import GRPOLoss

NUM_UPDATES = 2


def main(what: str, script: str) -> None:
    forward, result = GRPOLoss.forward, Evaluation.result

    def fail_to_learn(self, *args, **kwargs):
        if self.version >= NUM_UPDATES:
            raise ArithmeticError(f"injected after {NUM_UPDATES} updates")
        return forward(self, *args, **kwargs)

    def fail_to_evaluate(self, timeout_s=None):
        found = result(self, timeout_s)
        if found.policy_version >= NUM_UPDATES:
            raise RuntimeError(f"injected after {NUM_UPDATES} updates")
        return found

    if what == "learner":
        GRPOLoss.forward = fail_to_learn
    else:
        Evaluation.result = fail_to_evaluate
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    what = sys.argv[1]
    del sys.argv[:2]
    main(what, sys.argv[0])
